import COMLX

/// The cache of keys and values: what is in it, where a prompt is, and to bring, keep, write or forget rows.
public struct Cache: Sendable {
    let pool: PoolHandle
    /// `nil`: all models, or the default one where only one can be meant.
    let model: String?

    /// What there is of the model.
    public func stats() throws -> CacheStats {
        let json = try withOptionalCString(model) { model in
            var string: OpaquePointer?
            try check { omlx_cache_stats(pool.pointer, model, &string, $0) }
            return take(string)
        }
        return try decode(CacheStats.self, from: json)
    }

    /// Forgets what is neither in use nor pinned, and returns how much room that makes.
    @discardableResult
    public func clear(_ tiers: CacheTiers = .all) async throws -> UInt64 {
        let (pool, model) = (pool, model)
        return try await blocking {
            var bytes: UInt64 = 0
            try withOptionalCString(model) { model in
                try check { omlx_cache_clear(pool.pointer, model, tiers.rawValue, &bytes, $0) }
            }
            return bytes
        }
    }

    /// Writes what has been computed and no file has yet; throws `timeout` if that takes longer.
    public func flush(timeout: Duration = .seconds(60)) async throws {
        let (pool, model) = (pool, model)
        let milliseconds = UInt32(clamping: Int64((timeout / .milliseconds(1)).rounded(.up)))
        try await blocking {
            try withOptionalCString(model) { model in
                try check { omlx_cache_flush(pool.pointer, model, milliseconds, $0) }
            }
        }
    }

    /// Where the tokens of a request's prompt are.
    public func find(_ request: ChatRequest) async throws -> CacheLocation {
        let (pool, json) = (pool, json(of: request))
        return try await blocking {
            var string: OpaquePointer?
            try withBytes(of: json) { bytes, count in
                try check { omlx_cache_find(pool.pointer, bytes, count, &string, $0) }
            }
            return try decode(CacheLocation.self, from: take(string))
        }
    }

    /// Brings what other tiers have of a request's prompt into the pools, and returns how many tokens are there then.
    @discardableResult
    public func prefetch(_ request: ChatRequest) async throws -> Int {
        try await tokens(of: request) { omlx_cache_prefetch($0, $1, $2, $3, $4) }
    }

    /// Keeps what is cached of the beginning of a request's prompt, and returns for how many tokens. Run the request first.
    @discardableResult
    public func pin(_ request: ChatRequest) async throws -> Int {
        try await tokens(of: request) { omlx_cache_pin($0, $1, $2, $3, $4) }
    }

    /// Ends the pin of a request's prompt.
    public func unpin(_ request: ChatRequest) async throws {
        _ = try await tokens(of: request) { pool, bytes, count, _, error in
            omlx_cache_unpin(pool, bytes, count, error)
        }
    }

    private typealias OnPrompt = @Sendable (
        OpaquePointer, UnsafePointer<CChar>?, Int, UnsafeMutablePointer<UInt64>, UnsafeMutablePointer<OpaquePointer?>
    ) -> Int32

    private func tokens(of request: ChatRequest, _ call: @escaping OnPrompt) async throws -> Int {
        let (pool, json) = (pool, json(of: request))
        return try await blocking {
            var tokens: UInt64 = 0
            try withBytes(of: json) { bytes, count in
                try check { call(pool.pointer, bytes, count, &tokens, $0) }
            }
            return Int(clamping: tokens)
        }
    }

    private func json(of request: ChatRequest) -> String {
        var request = request
        request.model = model ?? request.model
        return request.json
    }
}

extension EnginePool {
    /// The caches of all models. `stats` means the default model, requests the one they name.
    public var cache: Cache { Cache(pool: handle, model: nil) }

    /// The limits of the caches that hold, in bytes. Those of files are `nil` without a `cacheFolder`.
    public func cacheLimits() throws -> CacheLimits {
        var limits = omlx_cache_limits()
        limits.struct_size = UInt32(MemoryLayout<omlx_cache_limits>.size)
        try check { omlx_cache_get_limits(handle.pointer, &limits, $0) }
        let hasFiles = limits.cold_bytes > 0
        return CacheLimits(
            hotMemory: .bytes(limits.hot_bytes), coldBytes: hasFiles ? limits.cold_bytes : nil,
            coldBytesPerModel: hasFiles ? limits.cold_bytes_per_model : nil)
    }

    /// Changes limits of the caches; what is beyond them goes.
    public func setCacheLimits(_ limits: CacheLimits) async throws {
        let handle = handle
        let (hotBytes, hotPercent) = try limits.hotMemory.numbers("hotMemory")
        try await blocking {
            var options = omlx_cache_limits()
            options.struct_size = UInt32(MemoryLayout<omlx_cache_limits>.size)
            (options.hot_bytes, options.hot_percent) = (hotBytes, hotPercent)
            options.cold_bytes = limits.coldBytes ?? 0
            options.cold_bytes_per_model = limits.coldBytesPerModel ?? 0
            try check { omlx_cache_set_limits(handle.pointer, &options, $0) }
        }
    }
}

extension Model {
    /// Its cache.
    public var cache: Cache { Cache(pool: pool.handle, model: id) }
}

/// Places where keys and values are kept.
public struct CacheTiers: OptionSet, Sendable {
    /// A sum of `omlx_cache_tier`.
    public let rawValue: UInt32

    /// The places of that sum.
    public init(rawValue: UInt32) {
        self.rawValue = rawValue
    }

    /// The pools that models compute with.
    public static let pools = Self(rawValue: OMLX_CACHE_TIER_POOLS.rawValue)
    /// The host's memory, where pools lie in another one.
    public static let hot = Self(rawValue: OMLX_CACHE_TIER_HOT.rawValue)
    /// Files.
    public static let cold = Self(rawValue: OMLX_CACHE_TIER_COLD.rawValue)
    /// All of them.
    public static let all: Self = [.pools, .hot, .cold]
}

/// Limits of a pool's cache; `nil` leaves one as it is.
public struct CacheLimits: Sendable, Hashable, Codable {
    public var hotMemory: PoolOptions.Memory?
    public var coldBytes: UInt64?
    /// `UInt64.max` ends that limit, and says that there is none.
    public var coldBytesPerModel: UInt64?

    /// Limits.
    public init(hotMemory: PoolOptions.Memory? = nil, coldBytes: UInt64? = nil, coldBytesPerModel: UInt64? = nil) {
        self.hotMemory = hotMemory
        self.coldBytes = coldBytes
        self.coldBytesPerModel = coldBytesPerModel
    }
}

/// State of a model's cache. What its engine tells is `nil` if it is not loaded; numbers of tiers have the library's names.
public struct CacheStats: Sendable, Hashable, Codable {
    public let blockTokens: Int?
    public let blockBytes: Int?
    public let blocksUsed: Int?
    public let blocksCached: Int?
    public let blocksFree: Int?
    public let entries: Int?
    /// Prompt tokens computed.
    public let promptTokens: Int?
    /// Prompt tokens found.
    public let cachedTokens: Int?
    /// The model's part of the hot tier.
    public let hot: [String: Double]?
    /// The model's part of the cold tier; `nil` without one.
    public let cold: [String: Double]?
    /// That of all models.
    public let coldTotal: [String: Double]?

    private enum CodingKeys: String, CodingKey {
        case hot, cold
        case entries = "cache_entries"
        case blockTokens = "block_tokens"
        case blockBytes = "block_bytes"
        case blocksUsed = "blocks_used"
        case blocksCached = "blocks_cached"
        case blocksFree = "blocks_free"
        case promptTokens = "prompt_tokens"
        case cachedTokens = "cached_tokens"
        case coldTotal = "cold_total"
    }
}

/// Where the tokens of a prompt are cached, each in the first tier that has it.
public struct CacheLocation: Sendable, Hashable, Codable {
    /// All but the last, which is computed in any case.
    public let tokens: Int
    public let pool: Int
    public let hot: Int
    public let cold: Int
    /// To be computed.
    public let missing: Int
    /// Why the match went no further: "complete", "other_tokens", "not_cached" or "not_identified".
    public let stoppedBy: String
    /// Until the first token, by what has been measured so far.
    public let restoreSeconds: Double
    public let computeSeconds: Double

    private enum CodingKeys: String, CodingKey {
        case tokens, pool, hot, cold, missing
        case stoppedBy = "stopped_by"
        case restoreSeconds = "restore_seconds"
        case computeSeconds = "compute_seconds"
    }
}
