/// A pool's memory, and its models that are loaded or about to be. `omlx_pool_status` of the C header describes it.
public struct PoolStatus: Sendable, Hashable, Codable {
    /// "cpu" or "gpu".
    public let device: String
    public let memory: Memory
    /// By id.
    public let models: [String: Model]
    /// Engines that end their last requests, or give their memory back.
    public let leaving: Int

    /// Bytes.
    public struct Memory: Sendable, Hashable, Codable {
        public let limit: UInt64
        public let used: UInt64
        /// The most that was ever used.
        public let peak: UInt64
        /// What models wait for.
        public let waiting: UInt64
        /// By model.
        public let owners: [String: Uses]
        /// Of the process.
        public let footprint: UInt64
        /// What the process has beyond `used`, and beyond what it had when the pool was opened.
        public let unaccounted: UInt64
        public let systemTotal: UInt64
        public let systemAvailable: UInt64
        /// Of the whole system: 0, 1 (caches shrink) or 2 (idle models go).
        public let pressure: Int

        private enum CodingKeys: String, CodingKey {
            case limit, used, peak, waiting, owners, footprint, unaccounted, pressure
            case systemTotal = "system_total"
            case systemAvailable = "system_available"
        }
    }

    /// What a model has, in bytes.
    public struct Uses: Sendable, Hashable, Codable {
        public let weights: UInt64
        public let cache: UInt64
        public let workspace: UInt64
        public let hot: UInt64
    }

    /// A model that is loaded, or about to be.
    public struct Model: Sendable, Hashable, Codable {
        /// "loading", "loaded" or "failed".
        public let state: String
        /// Why it failed.
        public let error: String?
        public let loadedBytes: UInt64
        public let weightBytes: UInt64
        /// Those that have not ended.
        public let requests: Int
        public let idleSeconds: Double
        public let pinned: Bool
        public let timeToLiveSeconds: Double?

        private enum CodingKeys: String, CodingKey {
            case state, error, requests, pinned
            case loadedBytes = "loaded_bytes"
            case weightBytes = "weight_bytes"
            case idleSeconds = "idle_seconds"
            case timeToLiveSeconds = "ttl_seconds"
        }
    }
}

/// Counters and state, by the library's names for them.
public struct PoolMetrics: Sendable, Hashable, Codable {
    /// By model.
    public let models: [String: [String: Double]]
    /// Of the pool as a whole.
    public let pool: [String: Double]
}
