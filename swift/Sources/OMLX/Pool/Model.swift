import COMLX

/// A model of a pool, by its id or alias.
public struct Model: Sendable {
    /// Its pool.
    public let pool: EnginePool
    /// Its name in requests.
    public let id: String

    /// Loads it. Requests load their model by themselves; this does it before them.
    public func load() async throws {
        let (handle, id) = (pool.handle, id)
        try await blocking {
            try withOptionalCString(id) { id in try check { omlx_model_load(handle.pointer, id, $0) } }
        }
    }

    /// Unloads it, and returns the bytes that became free. Its requests end first; or they are cancelled, and throw
    /// `cancelled`.
    @discardableResult
    public func unload(cancellingRequests: Bool = false) async throws -> UInt64 {
        let (handle, id) = (pool.handle, id)
        return try await blocking {
            var freed: UInt64 = 0
            try withOptionalCString(id) { id in
                try check { omlx_model_unload(handle.pointer, id, cancellingRequests ? 0 : 1, &freed, $0) }
            }
            return freed
        }
    }

    /// What is settled about it.
    public func settings() throws -> ModelSettings {
        let json = try withOptionalCString(id) { id in
            try pool.read { omlx_model_settings(pool.handle.pointer, id, $0, $1) }
        }
        return try decode(ModelSettings.self, from: json)
    }

    /// Settles all of it anew: what is `nil` is taken back. It holds at once, and is written to the pool's settings file.
    public func configure(_ settings: ModelSettings) async throws {
        let patch = settings.patch(forgetting: try self.settings().defaults)
        try await configure(json: patch)
    }

    /// Changes some of what is settled, by a JSON object as `omlx_model_configure` takes it.
    public func configure(json: String) async throws {
        let (handle, id) = (pool.handle, id)
        try await blocking {
            try withOptionalCString(id) { id in
                try withBytes(of: json) { bytes, count in
                    try check { omlx_model_configure(handle.pointer, id, bytes, count, $0) }
                }
            }
        }
    }

    /// Starts an answer to messages; `request` may leave out the model.
    public func generate(_ request: ChatRequest, options: RequestOptions = RequestOptions()) throws -> Generation {
        var request = request
        request.model = id
        return try pool.generate(request, options: options)
    }
}
