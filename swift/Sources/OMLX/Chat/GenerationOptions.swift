/// How a model answers. `nil` is the model's own setting; see `omlx_generate` in the C header.
public struct GenerationOptions: Sendable, Hashable {
    /// 0 is greedy.
    public var temperature: Double?
    /// The likeliest tokens that make up this part of the probability.
    public var topP: Double?
    /// This many of the likeliest tokens.
    public var topK: Int?
    /// Tokens at least this likely, compared with the likeliest.
    public var minP: Double?
    /// Makes sampling repeatable.
    public var seed: UInt32?
    /// Tokens of the answer at most, reasoning included.
    public var maximumResponseTokens: Int?
    /// Texts that end the answer.
    public var stop: [String]
    public var repetitionPenalty: Double?
    public var presencePenalty: Double?
    public var frequencyPenalty: Double?
    /// Whether the model thinks before it answers, if its chat template knows `enable_thinking`.
    public var enableThinking: Bool?
    /// Tokens of thinking at most.
    public var thinkingBudget: Int?
    /// Before whom the request runs.
    public var priority: Priority?

    /// Before whom a request runs.
    public enum Priority: String, Sendable {
        case high, normal, low
    }

    /// The model's own settings, but for what is given.
    public init(
        temperature: Double? = nil, topP: Double? = nil, seed: UInt32? = nil, maximumResponseTokens: Int? = nil,
        stop: [String] = [], enableThinking: Bool? = nil
    ) {
        self.temperature = temperature
        self.topP = topP
        self.seed = seed
        self.maximumResponseTokens = maximumResponseTokens
        self.stop = stop
        self.enableThinking = enableThinking
    }

    func write(to object: inout JSONObject) {
        object["temperature"] = temperature.map { .number($0) }
        object["top_p"] = topP.map { .number($0) }
        object["top_k"] = topK.map { .integer(Int64($0)) }
        object["min_p"] = minP.map { .number($0) }
        object["seed"] = seed.map { .integer(Int64($0)) }
        object["max_tokens"] = maximumResponseTokens.map { .integer(Int64($0)) }
        if !stop.isEmpty { object["stop"] = .array(stop.map { .string($0) }) }
        object["repetition_penalty"] = repetitionPenalty.map { .number($0) }
        object["presence_penalty"] = presencePenalty.map { .number($0) }
        object["frequency_penalty"] = frequencyPenalty.map { .number($0) }
        if let enableThinking { object["chat_template_kwargs"] = ["enable_thinking": .bool(enableThinking)] }
        object["thinking_budget"] = thinkingBudget.map { .integer(Int64($0)) }
        object["priority"] = priority.map { .string($0.rawValue) }
    }
}
