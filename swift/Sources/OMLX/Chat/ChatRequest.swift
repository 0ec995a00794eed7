/// A request for an answer to messages.
public struct ChatRequest: Sendable, Hashable {
    /// The model's id or alias; `nil` is the pool's default model.
    public var model: String?
    /// The conversation so far.
    public var messages: [ChatMessage]
    /// What the model may call.
    public var tools: [ToolDefinition]
    /// Whether it has to.
    public var toolChoice: ToolChoice?
    /// How it answers.
    public var options: GenerationOptions
    /// In which form.
    public var format: ResponseFormat?
    /// Other keys that `omlx_generate` takes, such as "logprobs" or "n"; they win over those above.
    public var others: JSONObject

    /// A request.
    public init(
        model: String? = nil, messages: [ChatMessage], tools: [ToolDefinition] = [], toolChoice: ToolChoice? = nil,
        options: GenerationOptions = GenerationOptions(), format: ResponseFormat? = nil, others: JSONObject = [:]
    ) {
        self.model = model
        self.messages = messages
        self.tools = tools
        self.toolChoice = toolChoice
        self.options = options
        self.format = format
        self.others = others
    }

    /// The JSON that the library takes.
    public var json: String {
        var object = JSONObject()
        object["model"] = model.map { .string($0) }
        object["messages"] = .array(messages.map(\.json))
        if !tools.isEmpty { object["tools"] = .array(tools.map(\.json)) }
        object["tool_choice"] = toolChoice?.json
        options.write(to: &object)
        object["response_format"] = format?.json
        object.merge(others)
        return JSONValue.object(object).json
    }
}

/// What a model is told of a tool.
public struct ToolDefinition: Sendable, Hashable {
    public var name: String
    public var description: String
    /// The schema of its arguments, an object.
    public var parameters: JSONSchema

    /// A definition.
    public init(name: String, description: String, parameters: JSONSchema) {
        self.name = name
        self.description = description
        self.parameters = parameters
    }

    var json: JSONValue {
        [
            "type": "function",
            "function": [
                "name": .string(name), "description": .string(description), "parameters": parameters.value,
            ],
        ]
    }
}

/// Whether a model calls tools.
public enum ToolChoice: Sendable, Hashable {
    /// As it likes.
    case auto
    /// It is not told of them.
    case none
    /// It has to call at least one.
    case required
    /// It has to call this one.
    case tool(String)

    var json: JSONValue {
        switch self {
        case .auto: "auto"
        case .none: "none"
        case .required: "required"
        case .tool(let name): ["type": "function", "function": ["name": .string(name)]]
        }
    }
}

/// The form of an answer. What does not fit cannot be sampled; an answer that was cut off is a beginning.
public enum ResponseFormat: Sendable, Hashable {
    case jsonObject
    case jsonSchema(JSONSchema)
    case regex(String)
    case choice([String])
    /// A grammar in the Lark dialect of llguidance.
    case grammar(String)

    var json: JSONValue {
        switch self {
        case .jsonObject: ["type": "json_object"]
        case .jsonSchema(let schema):
            ["type": "json_schema", "json_schema": ["name": "answer", "schema": schema.value]]
        case .regex(let expression): ["type": "regex", "regex": .string(expression)]
        case .choice(let choices): ["type": "choice", "choices": .array(choices.map { .string($0) })]
        case .grammar(let grammar): ["type": "grammar", "grammar": .string(grammar)]
        }
    }
}
