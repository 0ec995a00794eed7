import COMLX

/// Where the one reader of a request waits until the library says that an event is there.
///
/// A signal that comes before the reader waits is kept: an event between a fetch that found none and the wait is not missed.
final class Wake: Sendable {
    private enum State {
        case idle
        case raised
        case waiting(CheckedContinuation<Void, Never>)
    }

    private let state = Locked(State.idle)

    /// Whether the reader waits.
    var isWaiting: Bool {
        state.withLock { state in
            if case .waiting = state { true } else { false }
        }
    }

    /// Lets the reader go on, or not wait the next time. Returns at once, as the library asks of its wake function.
    func raise() {
        let waiting: CheckedContinuation<Void, Never>? = state.withLock { state in
            guard case .waiting(let continuation) = state else {
                state = .raised
                return nil
            }
            state = .idle
            return continuation
        }
        waiting?.resume()
    }

    /// Waits for a signal; by one task at a time.
    func wait() async {
        await withCheckedContinuation { continuation in
            let raised = state.withLock { state in
                guard case .raised = state else {
                    state = .waiting(continuation)
                    return false
                }
                state = .idle
                return true
            }
            if raised { continuation.resume() }
        }
    }
}
