import COMLX

/// Vectors of texts.
public struct Embeddings: Sendable, Hashable {
    /// One for each text, in their order.
    public let vectors: [[Float]]
    /// Texts of which the end was left out because they were too long.
    public let truncated: Int
    /// Its `promptTokens` are those of all texts.
    public let usage: Usage
}

/// How texts are encoded; `nil` is the model's own way.
public struct EmbeddingOptions: Sendable, Hashable {
    /// The first numbers of each vector only.
    public var dimensions: Int?
    /// Whether vectors have the length 1.
    public var normalize: Bool?
    /// Whether texts that are too long are cut, else `contextLength` is thrown.
    public var truncate: Bool
    public var priority: GenerationOptions.Priority?

    /// All defaults, but for what is given.
    public init(
        dimensions: Int? = nil, normalize: Bool? = nil, truncate: Bool = true,
        priority: GenerationOptions.Priority? = nil
    ) {
        self.dimensions = dimensions
        self.normalize = normalize
        self.truncate = truncate
        self.priority = priority
    }
}

extension Model {
    /// Vectors of texts. Cancelling the task cancels the request.
    public func embed(_ texts: [String], options: EmbeddingOptions = EmbeddingOptions()) async throws -> Embeddings {
        var json: JSONObject = [
            "model": .string(id), "input": .array(texts.map { .string($0) }), "truncate": .bool(options.truncate),
        ]
        json["dimensions"] = options.dimensions.map { .integer(Int64($0)) }
        json["normalize"] = options.normalize.map { .bool($0) }
        json["priority"] = options.priority.map { .string($0.rawValue) }
        let (event, usage) = try await result(of: omlx_embed, json: json)
        guard case .embeddings(let vectors, _, let truncated) = event else {
            throw OMLXError(.internal, "a request for vectors has a result of another kind")
        }
        return Embeddings(vectors: vectors, truncated: truncated, usage: usage)
    }

    /// The one result of a request that is not a generation.
    func result(of start: RequestHandle.Start, json: JSONObject) async throws -> (Event, Usage) {
        let json = JSONValue.object(json).json
        let reader = RequestReader(
            try RequestHandle(start, pool: pool.handle, json: json, options: RequestOptions()))
        var result: Event?
        while let event = try await reader.next({ Event($0) }) {
            switch event {
            case .embeddings, .scores: result = event
            case .failed(let error, _): throw error
            case .generation(.finished(let completion)):
                guard let result else { throw OMLXError(.internal, "a request has no result") }
                return (result, completion.usage)
            case .generation: break
            }
        }
        throw OMLXError(.internal, "a request has no end")
    }
}
