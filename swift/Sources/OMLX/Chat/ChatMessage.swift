/// A message of a conversation.
public struct ChatMessage: Sendable, Hashable {
    /// Who speaks.
    public enum Role: String, Sendable, Codable {
        case system, user, assistant, tool
    }

    /// Who speaks.
    public var role: Role
    /// What is said.
    public var content: String
    /// What the assistant thought before; the chat template decides whether the model sees it again.
    public var reasoning: String
    /// The tools that the assistant calls.
    public var toolCalls: [ToolCall]
    /// Of a tool's message: the id of the call that it answers.
    public var toolCallID: String?

    /// A message.
    public init(
        role: Role, content: String, reasoning: String = "", toolCalls: [ToolCall] = [], toolCallID: String? = nil
    ) {
        self.role = role
        self.content = content
        self.reasoning = reasoning
        self.toolCalls = toolCalls
        self.toolCallID = toolCallID
    }

    /// What the assistant is told to be.
    public static func system(_ content: String) -> Self { Self(role: .system, content: content) }
    /// What the user says.
    public static func user(_ content: String) -> Self { Self(role: .user, content: content) }
    /// What the assistant answered.
    public static func assistant(_ content: String) -> Self { Self(role: .assistant, content: content) }
    /// What came of a tool call.
    public static func tool(_ content: String, callID: String) -> Self {
        Self(role: .tool, content: content, toolCallID: callID)
    }

    var json: JSONValue {
        var object: JSONObject = ["role": .string(role.rawValue), "content": .string(content)]
        if !reasoning.isEmpty { object["reasoning_content"] = .string(reasoning) }
        if !toolCalls.isEmpty { object["tool_calls"] = .array(toolCalls.map(\.json)) }
        if let toolCallID { object["tool_call_id"] = .string(toolCallID) }
        return .object(object)
    }
}

/// A call of a tool, as the model wrote it.
public struct ToolCall: Sendable, Hashable {
    /// Names the call, for the message with its result.
    public var id: String
    /// The tool's name. The model may have invented it.
    public var name: String
    /// JSON text. Whether it fits the tool, the host decides.
    public var arguments: String

    /// A call.
    public init(id: String, name: String, arguments: String) {
        self.id = id
        self.name = name
        self.arguments = arguments
    }

    var json: JSONValue {
        ["id": .string(id), "type": "function", "function": ["name": .string(name), "arguments": .string(arguments)]]
    }
}
