import COMLX
import Foundation

/// Options of a pool; what is not said is the default. `omlx_pool_options` of the C header describes them.
public struct PoolOptions: Sendable, Hashable {
    /// Where to compute.
    public enum Device: UInt32, Sendable {
        case auto, cpu, gpu
    }

    /// Number format of weights that are not quantised, and of keys and values.
    public enum DType: UInt32, Sendable {
        case auto, float32, float16, bfloat16
    }

    /// How products with weights are computed on the CPU.
    public enum Precision: UInt32, Sendable {
        case fast, exact
    }

    /// How keys and values are stored in files.
    public enum CacheCodec: UInt32, Sendable {
        case exact, bits8
    }

    /// A part of the memory.
    public enum Memory: Sendable, Hashable, Codable {
        case bytes(UInt64)
        case percent(Int)
    }

    /// Models in folders of the Hugging Face hub's own tools.
    public enum HubCache: Sendable, Hashable {
        case standard
        case folder(URL)
    }

    /// A folder of model folders, or one model's folder; `nil` takes the models that come with the library.
    public var modelsFolder: URL?
    public var defaultModel: String?
    public var device = Device.auto
    public var dtype = DType.auto
    public var precision = Precision.fast
    /// Tokens of every model's context at most.
    public var contextLength: Int?
    /// Prompt tokens in one forward pass.
    public var prefillChunk: Int?
    public var keepsEnvironment = false
    /// Threads that compute on the CPU.
    public var threads: Int?
    /// Answers of a model that are computed together.
    public var maximumSequences: Int?
    /// Requests that may wait for a model.
    public var queueLength: Int?
    /// What a step should take while answers are running.
    public var targetLatency: Duration?
    /// Bytes for keys and values of each model.
    public var cacheBytes: UInt64?
    public var blockTokens: Int?
    /// Where keys and values outlive the process.
    public var cacheFolder: URL?
    public var coldBytes: UInt64?
    public var coldBytesPerModel: UInt64?
    public var hotMemory: Memory?
    public var cacheNamespace: String?
    public var cacheWriteThrough = false
    public var cacheCodec = CacheCodec.exact
    /// What all models may take together.
    public var memoryLimit: Memory?
    /// A model without requests is unloaded after this time.
    public var timeToLive: Duration?
    /// Where settings of models are kept.
    public var settingsFile: URL?
    public var hubCache: HubCache?

    /// Options with a folder of models, or the bundled ones.
    public init(modelsFolder: URL? = nil, defaultModel: String? = nil) {
        self.modelsFolder = modelsFolder
        self.defaultModel = defaultModel
    }

    /// Calls `body` with the options as C has them.
    func withC<Result>(_ body: (UnsafePointer<omlx_pool_options>) throws -> Result) throws -> Result {
        var options = omlx_pool_options()
        options.struct_size = UInt32(MemoryLayout<omlx_pool_options>.size)
        options.device = device.rawValue
        options.dtype = dtype.rawValue
        options.precision = precision.rawValue
        options.context_length = try count(contextLength, "contextLength")
        options.prefill_chunk = try count(prefillChunk, "prefillChunk")
        options.keep_environment = keepsEnvironment ? 1 : 0
        options.threads = try count(threads, "threads")
        options.max_sequences = try count(maximumSequences, "maximumSequences")
        options.queue_length = try count(queueLength, "queueLength")
        options.target_latency_ms = try count(targetLatency.map { Int($0 / .milliseconds(1)) }, "targetLatency")
        options.cache_bytes = cacheBytes ?? 0
        options.block_tokens = try count(blockTokens, "blockTokens")
        options.cold_bytes = coldBytes ?? 0
        options.cold_bytes_per_model = coldBytesPerModel ?? 0
        (options.hot_bytes, options.hot_percent) = try hotMemory.numbers("hotMemory")
        options.cache_write_through = cacheWriteThrough ? 1 : 0
        options.cache_codec = cacheCodec.rawValue
        (options.memory_limit, options.memory_percent) = try memoryLimit.numbers("memoryLimit")
        options.ttl_seconds = try count(timeToLive.map { Int($0 / .seconds(1)) }, "timeToLive")
        return try withTexts(of: options, body)
    }

    private func withTexts<Result>(
        of options: omlx_pool_options, _ body: (UnsafePointer<omlx_pool_options>) throws -> Result
    ) throws -> Result {
        let hub: String? =
            switch hubCache {
            case .standard: ""
            case .folder(let folder): folder.path
            case nil: nil
            }
        let texts = [modelsFolder?.path, defaultModel, cacheFolder?.path, cacheNamespace, settingsFile?.path, hub]
        return try withOptionalCStrings(texts) { texts in
            var options = options
            options.models_dir = texts[0]
            options.default_model = texts[1]
            options.cache_dir = texts[2]
            options.cache_namespace = texts[3]
            options.settings_file = texts[4]
            options.hub_cache = texts[5]
            return try body(&options)
        }
    }
}

/// A number as C has it; 0 is the default.
private func count(_ value: Int?, _ name: String) throws -> UInt32 {
    guard let value else { return 0 }
    guard value > 0, let count = UInt32(exactly: value) else {
        throw OMLXError(.invalidArgument, "\(name) is \(value), which is out of range")
    }
    return count
}

extension PoolOptions.Memory? {
    /// Bytes and percent, of which one is 0.
    func numbers(_ name: String) throws -> (UInt64, UInt32) {
        switch self {
        case .bytes(let bytes): (bytes, 0)
        case .percent(let percent): (0, try count(percent, name))
        case nil: (0, 0)
        }
    }
}

/// Calls `body` with C strings that live for the call.
private func withOptionalCStrings<Result>(
    _ texts: [String?], _ body: ([UnsafePointer<CChar>?]) throws -> Result
) throws -> Result {
    guard let first = texts.first else { return try body([]) }
    return try withOptionalCString(first) { pointer in
        try withOptionalCStrings(Array(texts.dropFirst())) { try body([pointer] + $0) }
    }
}
