import Foundation

/// A JSON value. Objects keep the order of their keys: it is the order in which a model sees a tool's parameters, and in which
/// it writes a structured answer.
public enum JSONValue: Sendable, Hashable {
    case null
    case bool(Bool)
    case integer(Int64)
    case number(Double)
    case string(String)
    case array([JSONValue])
    case object(JSONObject)

    /// The value of a JSON text; keys of objects are in alphabetical order.
    public init(json: String) throws {
        do {
            self = try JSONDecoder().decode(JSONValue.self, from: Data(json.utf8))
        } catch {
            throw OMLXError(.invalidArgument, "not JSON: \(error)")
        }
    }

    /// As JSON text.
    public var json: String {
        var text = ""
        write(to: &text)
        return text
    }

    private func write(to text: inout String) {
        switch self {
        case .null: text += "null"
        case .bool(let value): text += value ? "true" : "false"
        case .integer(let value): text += String(value)
        // What is no number in JSON ("nan") makes the text invalid, and the library refuses it.
        case .number(let value): text += value.description
        case .string(let value): value.writeJSON(to: &text)
        case .array(let values):
            text += "["
            for (index, value) in values.enumerated() {
                if index > 0 { text += "," }
                value.write(to: &text)
            }
            text += "]"
        case .object(let object):
            text += "{"
            for (index, (key, value)) in object.pairs.enumerated() {
                if index > 0 { text += "," }
                key.writeJSON(to: &text)
                text += ":"
                value.write(to: &text)
            }
            text += "}"
        }
    }
}

/// A JSON object that keeps the order of its keys. Encoders have an order of their own, and what is decoded an alphabetical one.
public struct JSONObject: Sendable, ExpressibleByDictionaryLiteral {
    fileprivate private(set) var pairs: [(key: String, value: JSONValue)] = []

    /// An object with these keys; if one comes twice, the last value counts.
    public init(dictionaryLiteral elements: (String, JSONValue)...) {
        elements.forEach { self[$0.0] = $0.1 }
    }

    /// The keys in order.
    public var keys: [String] { pairs.map(\.key) }

    /// The value of a key. A new key goes to the end; `nil` removes it.
    public subscript(key: String) -> JSONValue? {
        get { pairs.first { $0.key == key }?.value }
        set {
            let index = pairs.firstIndex { $0.key == key }
            switch (index, newValue) {
            case (let index?, let value?): pairs[index].value = value
            case (let index?, nil): pairs.remove(at: index)
            case (nil, let value?): pairs.append((key, value))
            case (nil, nil): break
            }
        }
    }

    /// Takes over the keys of another object, whose values count.
    public mutating func merge(_ other: JSONObject) {
        other.pairs.forEach { self[$0.key] = $0.value }
    }
}

extension JSONObject: Hashable {
    /// Whether keys and values are the same, in the same order.
    public static func == (left: Self, right: Self) -> Bool {
        left.pairs.elementsEqual(right.pairs) { $0.key == $1.key && $0.value == $1.value }
    }

    public func hash(into hasher: inout Hasher) {
        for (key, value) in pairs {
            hasher.combine(key)
            hasher.combine(value)
        }
    }
}

extension JSONValue: Codable {
    public init(from decoder: any Decoder) throws {
        let container = try decoder.singleValueContainer()
        if container.decodeNil() {
            self = .null
        } else if let value = try? container.decode(Bool.self) {
            self = .bool(value)
        } else if let value = try? container.decode(Int64.self) {
            self = .integer(value)
        } else if let value = try? container.decode(Double.self) {
            self = .number(value)
        } else if let value = try? container.decode(String.self) {
            self = .string(value)
        } else if let values = try? container.decode([JSONValue].self) {
            self = .array(values)
        } else {
            var object = JSONObject()
            let values = try container.decode([String: JSONValue].self)
            values.keys.sorted().forEach { object[$0] = values[$0] }
            self = .object(object)
        }
    }

    public func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        switch self {
        case .null: try container.encodeNil()
        case .bool(let value): try container.encode(value)
        case .integer(let value): try container.encode(value)
        case .number(let value): try container.encode(value)
        case .string(let value): try container.encode(value)
        case .array(let values): try container.encode(values)
        case .object(let object):
            try container.encode(Dictionary(uniqueKeysWithValues: object.pairs.map { ($0.key, $0.value) }))
        }
    }
}

extension JSONObject: Codable {
    public init(from decoder: any Decoder) throws {
        guard case .object(let object) = try JSONValue(from: decoder) else {
            throw DecodingError.typeMismatch(
                Self.self, .init(codingPath: decoder.codingPath, debugDescription: "not a JSON object"))
        }
        self = object
    }

    public func encode(to encoder: any Encoder) throws {
        try JSONValue.object(self).encode(to: encoder)
    }
}

extension JSONValue: ExpressibleByNilLiteral, ExpressibleByBooleanLiteral, ExpressibleByIntegerLiteral,
    ExpressibleByFloatLiteral, ExpressibleByStringInterpolation, ExpressibleByArrayLiteral, ExpressibleByDictionaryLiteral
{
    public init(nilLiteral: ()) { self = .null }
    public init(booleanLiteral value: Bool) { self = .bool(value) }
    public init(integerLiteral value: Int64) { self = .integer(value) }
    public init(floatLiteral value: Double) { self = .number(value) }
    public init(stringLiteral value: String) { self = .string(value) }
    public init(arrayLiteral elements: JSONValue...) { self = .array(elements) }
    public init(dictionaryLiteral elements: (String, JSONValue)...) {
        var object = JSONObject()
        elements.forEach { object[$0.0] = $0.1 }
        self = .object(object)
    }
}

extension String {
    /// Adds this text to `text` as a JSON string.
    fileprivate func writeJSON(to text: inout String) {
        text += "\""
        for scalar in unicodeScalars {
            switch scalar {
            case "\"": text += "\\\""
            case "\\": text += "\\\\"
            case "\n": text += "\\n"
            case "\r": text += "\\r"
            case "\t": text += "\\t"
            case "\0"..<" ": text += "\\u00" + (scalar.value < 16 ? "0" : "") + String(scalar.value, radix: 16)
            default: text.unicodeScalars.append(scalar)
            }
        }
        text += "\""
    }
}
