import COMLX

/// A reference to a request in the pull form. When it goes, the request is cancelled.
final class RequestHandle: @unchecked Sendable {
    // Unchecked: the pointer never changes, and the library's functions may be called from any thread, but for
    // `omlx_request_next`, which only the one `RequestReader` calls.
    let pointer: OpaquePointer
    let wake = Wake()
    /// `cancel` was called, not only the reader given up.
    private let cancelledByHost = Locked(false)

    typealias Start = (
        OpaquePointer?, UnsafePointer<CChar>?, Int, UnsafePointer<omlx_generate_options>?,
        UnsafeMutablePointer<OpaquePointer?>?, UnsafeMutablePointer<OpaquePointer?>?
    ) -> Int32

    /// Starts a request with one of the C functions that do. Returns at once.
    init(_ start: Start, pool: PoolHandle, json: String, options delivery: RequestOptions) throws {
        var options = omlx_generate_options()
        options.struct_size = UInt32(MemoryLayout<omlx_generate_options>.size)
        options.lenient = delivery.ignoresUnknownKeys ? 1 : 0
        options.loading_events = delivery.reportsLoading ? 1 : 0
        options.started_event = delivery.reportsStart ? 1 : 0
        var request: OpaquePointer?
        try check { error in
            withBytes(of: json) { start(pool.pointer, $0, $1, &options, &request, error) }
        }
        guard let request else { throw OMLXError(.internal, "no request came back") }
        pointer = request
        HandleCount.requests.add(1)
        let onWake: omlx_wake_fn = { lent($0, as: Wake.self)?.raise() }
        // If this throws, `deinit` runs: every stored property is there.
        try check { omlx_request_set_wake(request, onWake, lend(wake), takeBack, $0) }
    }

    /// Id of the model that answers.
    var modelID: String { text(omlx_request_model(pointer)) }

    var isCancelledByHost: Bool { cancelledByHost.withLock { $0 } }

    /// Asks the request to end, as the host's decision.
    func cancel() {
        cancelledByHost.withLock { $0 = true }
        abandon()
    }

    /// Asks the request to end because nobody will read it.
    func abandon() {
        omlx_request_cancel(pointer)
    }

    enum Fetched<Value> {
        case event(Value)
        /// None is there now.
        case none
        /// The done event was fetched before.
        case ended
    }

    /// The next event as `read` sees it, if there is one. `read` gets an event that is gone afterwards; kinds for which it
    /// returns `nil` are passed over.
    func fetch<Value>(_ read: (omlx_event) -> Value?) throws -> Fetched<Value> {
        while true {
            var event: UnsafePointer<omlx_event>?
            // No error output: "none yet" is the usual answer, and the status says it.
            switch OMLXError.Code(rawValue: omlx_request_next(pointer, 0, &event, nil)) {
            case .ok:
                guard let event else { throw OMLXError(.internal, "no event came back") }
                if let value = read(event.pointee) { return .event(value) }
            case .timeout: return .none
            case .closed: return .ended
            case let code: throw OMLXError(code, code.description)
            }
        }
    }

    deinit {
        // The release of the last reference cancels, too; this one may not be the last.
        abandon()
        omlx_request_release(pointer)
        HandleCount.requests.add(-1)
    }
}

extension OMLXError.Code {
    fileprivate static let ok = Self(rawValue: success)
}
