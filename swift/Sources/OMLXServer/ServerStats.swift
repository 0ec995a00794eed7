/// What a server tells of itself: `/admin/api/status`.
public struct ServerStats: Sendable, Hashable, Codable {
    public let version: String
    public let uptimeSeconds: Int
    /// Requests whose answer has not begun.
    public let active: Int
    public let pool: Pool
    public let metrics: Metrics

    public struct Pool: Sendable, Hashable, Codable {
        public let device: String
        public let memory: Memory
        /// By id: those that are loaded, or about to be.
        public let models: [String: Model]
    }

    /// Bytes.
    public struct Memory: Sendable, Hashable, Codable {
        public let limit: UInt64
        public let used: UInt64
    }

    public struct Model: Sendable, Hashable, Codable {
        /// "loading", "loaded" or "failed".
        public let state: String
        /// Those that have not ended.
        public let requests: Int
    }

    /// Numbers by the library's names.
    public struct Metrics: Sendable, Hashable, Codable {
        public let models: [String: [String: Double]]
    }

    private enum CodingKeys: String, CodingKey {
        case version, active, pool, metrics
        case uptimeSeconds = "uptime_seconds"
    }

    /// Requests of all models that have not ended.
    public var requests: Int { pool.models.values.reduce(0) { $0 + $1.requests } }

    /// Tokens that all models have sampled since they were loaded.
    public var completionTokens: Int {
        metrics.models.values.reduce(0) { $0 + Int($1["completion_tokens"] ?? 0) }
    }
}
