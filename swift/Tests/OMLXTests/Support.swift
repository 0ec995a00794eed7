import COMLX
import Foundation
import Testing

@testable import OMLX

/// All tests against the library: one after the other, so that each can see that it leaves nothing behind.
@Suite(.serialized) struct LibraryTests {}

/// The project this package is a part of.
let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent().deletingLastPathComponent()

/// The bundled model.
let modelFolder = root.appendingPathComponent("models/tiny-chat")

/// A number from the environment, which the long suites set.
func count(_ variable: String, default standard: Int) -> Int {
    ProcessInfo.processInfo.environment[variable].flatMap { Int($0) } ?? standard
}

/// References to objects of the library.
func handles() -> [Int] {
    [HandleCount.pools, .requests, .downloads, .callbacks].map(\.value)
}

/// Runs `body` with a pool that has the bundled model, closes the pool, and checks that nothing of it is left.
func withPool(_ options: PoolOptions = PoolOptions(), _ body: (EnginePool, Model) async throws -> Void) async throws {
    var options = options
    options.modelsFolder = options.modelsFolder ?? modelFolder
    options.device = .cpu
    do {
        let pool = try await EnginePool(options)
        do {
            try await body(pool, pool.model("tiny-chat"))
        } catch {
            try await pool.close()
            throw error
        }
        try await pool.close()
    }
    // A thread of the library may still be about to give back what it was lent.
    #expect(await eventually { handles() == [0, 0, 0, 0] }, "left behind: \(handles())")
}

/// The error that `body` throws; that there is none, or another one, is a failure.
func failure<Failure: Error, Value>(
    _: Failure.Type, _ location: SourceLocation = #_sourceLocation, _ body: () async throws -> Value
) async throws -> Failure {
    do {
        let value = try await body()
        Issue.record("no error, but \(value)", sourceLocation: location)
    } catch let error as Failure {
        return error
    } catch {
        Issue.record("another error: \(error)", sourceLocation: location)
    }
    throw NoFailure()
}

/// Checks that `body` throws an error of the library's with this code.
func expect<Value>(
    _ code: OMLXError.Code, _ location: SourceLocation = #_sourceLocation, _ body: () async throws -> Value
) async throws {
    let error = try await failure(OMLXError.self, location, body)
    #expect(error.code == code, sourceLocation: location)
}

private struct NoFailure: Error {}

/// Whether a condition holds within ten seconds.
func eventually(_ condition: () throws -> Bool) async rethrows -> Bool {
    for _ in 0..<1000 {
        if try condition() { return true }
        try? await Task.sleep(for: .milliseconds(10))
    }
    return try condition()
}

/// A request that would go on for long.
func endless(_ tokens: Int = 3500) -> ChatRequest {
    ChatRequest(
        model: "tiny-chat", messages: [.user("Tell me a short story about a fox.")],
        options: GenerationOptions(temperature: 0, maximumResponseTokens: tokens), others: ["ignore_eos": true])
}

/// An engine whose thread stands still: the wake function of a request does not return. Nobody who waits for its model gets an
/// event, nor a done event, until it goes on.
final class HeldEngine: Sendable {
    private let request: RequestHandle
    private let gate = Gate()

    /// Waits until it stands still.
    init(_ model: Model) async throws {
        let (request, gate) = (try model.generate(endless()).request, gate)
        self.request = request
        try check { error in
            gate.host.withLock { $0 = pthread_self() }
            let onWake: omlx_wake_fn = { lent($0, as: Gate.self)?.pass() }
            return omlx_request_set_wake(request.pointer, onWake, lend(gate), takeBack, error)
        }
        // It is woken for an event where none was, so events must not stay.
        let stands = try await eventually {
            while case .event = try request.fetch({ _ in () }) {}
            return gate.isEntered.withLock { $0 }
        }
        if !stands { goOn() }
        try #require(stands)
    }

    /// Lets it go on, without the request that held it.
    func goOn() {
        request.cancel()
        gate.opened.signal()
    }

    private final class Gate: Sendable {
        /// The thread that sets the wake function may have to call it, and must not stand still.
        let host = Locked<pthread_t?>(nil)
        let isEntered = Locked(false)
        let opened = DispatchSemaphore(value: 0)

        func pass() {
            guard host.withLock({ $0 }) != pthread_self(), !isEntered.withLock({ $0 }) else { return }
            isEntered.withLock { $0 = true }
            opened.wait()
        }
    }
}

/// A reference to a request of our own, to see how it ends after Swift's owners are gone.
struct Witness: @unchecked Sendable {
    private let request: OpaquePointer

    init(_ generation: Generation) {
        request = generation.request.pointer
        omlx_request_retain(request)
    }

    /// Reads what is left; nobody else may read any more. Returns the done events, and checks that nothing follows them.
    func dones() async throws -> [(reason: FinishReason, status: OMLXError.Code, tokens: Int)] {
        try await blocking {
            var dones: [(FinishReason, OMLXError.Code, Int)] = []
            while true {
                var event: UnsafePointer<omlx_event>?
                let status = OMLXError.Code(rawValue: omlx_request_next(request, 20_000, &event, nil))
                guard let event = event?.pointee, status.rawValue == 0 else {
                    omlx_request_release(request)
                    guard status == .closed else { throw OMLXError(status, "instead of the end") }
                    return dones
                }
                guard event.kind == OMLX_EVENT_KIND_DONE.rawValue else {
                    #expect(dones.isEmpty, "something came after the done event")
                    continue
                }
                dones.append(
                    (FinishReason(rawValue: event.finish_reason), OMLXError.Code(rawValue: event.status),
                     Int(event.usage.completion_tokens)))
            }
        }
    }

    /// Whether an event is there. It is lost.
    func hasEvent() -> Bool {
        var event: UnsafePointer<omlx_event>?
        return omlx_request_next(request, 0, &event, nil) == success
    }

    /// Checks that the request was cancelled, and ended once.
    func expectCancelled(_ location: SourceLocation = #_sourceLocation) async throws {
        let dones = try await dones()
        #expect(dones.map(\.reason) == [.cancelled], sourceLocation: location)
        #expect(dones.map(\.status) == [.cancelled], sourceLocation: location)
        #expect(dones.allSatisfy { $0.tokens < 3500 }, sourceLocation: location)
    }
}
