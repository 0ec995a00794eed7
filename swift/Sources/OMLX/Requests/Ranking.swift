import COMLX

/// How well documents answer a query.
public struct Ranking: Sendable, Hashable {
    /// One for each document, in their order; only those of one model can be compared.
    public let scores: [Float]
    /// Which documents have the best scores, best first.
    public let order: [Int]
    /// Documents of which the end was left out because they were too long.
    public let truncated: Int
    public let usage: Usage
}

extension Model {
    /// Scores of documents for a query, and which `top` ones are best (all by default). Cancelling the task cancels the
    /// request.
    public func rerank(
        _ documents: [String], for query: String, top: Int? = nil, instruction: String? = nil, truncate: Bool = true
    ) async throws -> Ranking {
        var json: JSONObject = [
            "model": .string(id), "query": .string(query), "documents": .array(documents.map { .string($0) }),
            "truncate": .bool(truncate),
        ]
        json["top_n"] = top.map { .integer(Int64($0)) }
        json["instruction"] = instruction.map { .string($0) }
        let (event, usage) = try await result(of: omlx_rerank, json: json)
        guard case .scores(let scores, let order, let truncated) = event else {
            throw OMLXError(.internal, "a request for scores has a result of another kind")
        }
        return Ranking(scores: scores, order: order, truncated: truncated, usage: usage)
    }
}
