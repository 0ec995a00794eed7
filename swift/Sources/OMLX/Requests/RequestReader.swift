import COMLX

/// The one reader of a request. It pulls: an event is fetched when somebody asks for it, so a slow reader pauses the model
/// instead of filling a buffer. When it goes, nobody can read the rest, and the request is cancelled.
final class RequestReader: Sendable {
    private let request: RequestHandle
    private let isReading = Locked(false)

    init(_ request: RequestHandle) {
        self.request = request
    }

    deinit {
        request.abandon()
    }

    /// The next event as `read` sees it; `nil` behind the done event. If the task is cancelled, so is the request, and
    /// this throws `CancellationError` at once.
    func next<Value: Sendable>(_ read: @Sendable (omlx_event) -> Value?) async throws -> Value? {
        let isFree = isReading.withLock { reading in
            defer { reading = true }
            return !reading
        }
        guard isFree else { throw OMLXError(.invalidArgument, "two tasks read the same request") }
        defer { isReading.withLock { $0 = false } }
        return try await withTaskCancellationHandler {
            while true {
                try Task.checkCancellation()
                switch try request.fetch(read) {
                case .event(let value): return value
                case .ended: return nil
                case .none: await request.wake.wait()
                }
            }
        } onCancel: {
            request.abandon()
            // Its done event may take a while, if a model is being loaded; the reader does not wait for it.
            request.wake.raise()
        }
    }
}
