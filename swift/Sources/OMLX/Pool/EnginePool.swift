import COMLX
import Foundation

/// Models, and an engine for each one that is loaded, under one limit of memory.
///
/// Methods that are `async` wait for the library on threads of their own; all others return at once. When nobody holds the
/// pool and its requests any more it is closed, without waiting for that; `close` waits.
public final class EnginePool: Sendable {
    let handle: PoolHandle

    /// Opens a pool and lists its models; none is loaded.
    public init(_ options: PoolOptions = PoolOptions()) async throws {
        handle = try await blocking {
            try OMLXLibrary.checkABI()
            return try options.withC { options in
                var pool: OpaquePointer?
                try check { omlx_pool_open(options, &pool, $0) }
                guard let pool else { throw OMLXError(.internal, "no pool came back") }
                return PoolHandle(owning: pool)
            }
        }
    }

    /// Ends all requests (they throw `closed`) and downloads, unloads all models, and waits for that.
    public func close() async throws {
        let handle = handle
        try await blocking { try check { omlx_pool_close(handle.pointer, $0) } }
    }

    /// A model of the pool. That there is one of this id, or alias, its requests find out.
    public func model(_ id: String) -> Model {
        Model(pool: self, id: id)
    }

    /// All models, ordered by id; also folders that look like models, with what is wrong with them.
    public func models() throws -> [ModelInfo] {
        try decode([ModelInfo].self, from: read { omlx_pool_models(handle.pointer, $0, $1) })
    }

    /// Adds the model in a folder; without an id, under the folder's name.
    public func addModel(at folder: URL, id: String? = nil) async throws -> Model {
        let handle = handle
        try await blocking {
            try withOptionalCString(id) { id in
                try withOptionalCString(folder.path) { folder in
                    try check { omlx_pool_add_model(handle.pointer, folder, id, $0) }
                }
            }
        }
        return model(id ?? folder.standardizedFileURL.lastPathComponent)
    }

    /// Looks into the folders of models again.
    public func rescan() async throws {
        let handle = handle
        try await blocking { try check { omlx_pool_rescan(handle.pointer, $0) } }
    }

    /// The pool's memory, and its models that are loaded or about to be.
    public func status() throws -> PoolStatus {
        try decode(PoolStatus.self, from: read { omlx_pool_status(handle.pointer, $0, $1) })
    }

    /// Counters and state of all loaded models, and of the pool.
    public func metrics() throws -> PoolMetrics {
        let format = OMLX_METRICS_FORMAT_JSON.rawValue
        return try decode(PoolMetrics.self, from: read { omlx_pool_metrics(handle.pointer, format, $0, $1) })
    }

    /// The same in Prometheus's text format.
    public func prometheusMetrics() throws -> String {
        try read { omlx_pool_metrics(handle.pointer, OMLX_METRICS_FORMAT_PROMETHEUS.rawValue, $0, $1) }
    }

    /// Changes what all models may take together; `nil` is what can be spared.
    public func setMemoryLimit(_ limit: PoolOptions.Memory?) throws {
        let (bytes, percent) = try limit.numbers("limit")
        try check { omlx_pool_set_memory_limit(handle.pointer, bytes, percent, $0) }
    }

    /// Starts a generation and returns at once: what fails later, the generation throws.
    public func generate(_ request: ChatRequest, options: RequestOptions = RequestOptions()) throws -> Generation {
        try generate(json: request.json, options: options)
    }

    /// The same for a request as JSON, as `omlx_generate` takes it.
    public func generate(json: String, options: RequestOptions = RequestOptions()) throws -> Generation {
        Generation(try RequestHandle(omlx_generate, pool: handle, json: json, options: options))
    }

    /// A text of the library's.
    func read(_ call: (UnsafeMutablePointer<OpaquePointer?>, UnsafeMutablePointer<OpaquePointer?>) throws -> Int32)
        throws -> String
    {
        var string: OpaquePointer?
        try check { try call(&string, $0) }
        return take(string)
    }
}
