/// A JSON schema: the form of a typed answer, or of a tool's arguments.
///
///     let person = JSONSchema.object(["name": .string, "age": .integer])
public struct JSONSchema: Sendable, Hashable, ExpressibleByDictionaryLiteral {
    /// The schema as JSON.
    public let value: JSONValue

    /// The schema that `value` is.
    public init(_ value: JSONValue) {
        self.value = value
    }

    /// The schema of a JSON text. Keys come into alphabetical order; where that matters, write `object`.
    public init(json: String) throws {
        self.init(try JSONValue(json: json))
    }

    /// The schema with these keys.
    public init(dictionaryLiteral elements: (String, JSONValue)...) {
        var object = JSONObject()
        elements.forEach { object[$0.0] = $0.1 }
        self.init(.object(object))
    }

    /// A text.
    public static let string: Self = ["type": "string"]
    /// A whole number.
    public static let integer: Self = ["type": "integer"]
    /// A number.
    public static let number: Self = ["type": "number"]
    /// True or false.
    public static let boolean: Self = ["type": "boolean"]

    /// One of these texts.
    public static func string(oneOf choices: [String]) -> Self {
        ["type": "string", "enum": .array(choices.map { .string($0) })]
    }

    /// A whole number within limits.
    public static func integer(in range: ClosedRange<Int64>) -> Self {
        ["type": "integer", "minimum": .integer(range.lowerBound), "maximum": .integer(range.upperBound)]
    }

    /// A list of values that all have the same schema.
    public static func array(of items: Self) -> Self {
        ["type": "array", "items": items.value]
    }

    /// An object with these properties, in this order, and no others. `required` are those that have to be there: by default
    /// all.
    public static func object(_ properties: KeyValuePairs<String, Self>, required: [String]? = nil) -> Self {
        var object = JSONObject()
        properties.forEach { object[$0.key] = $0.value.value }
        let required = required ?? object.keys
        return [
            "type": "object", "properties": .object(object), "required": .array(required.map { .string($0) }),
            "additionalProperties": false,
        ]
    }

    /// The same with a description, which tools show the model.
    public func described(as description: String) -> Self {
        guard case .object(var object) = value else { return self }
        object["description"] = .string(description)
        return Self(.object(object))
    }
}
