import Foundation

/// Runs `omlx-server` as a child process, and starts it again when it crashes.
public actor ServerController {
    /// How the server is.
    public enum State: Sendable, Hashable, Codable {
        case stopped
        case starting
        /// It answers at this address.
        case running(URL)
        /// It has crashed, and is started again after a pause.
        case crashed(String, restartIn: Duration)
        case stopping
        /// It crashed too often, or cannot be run.
        case failed(String)
    }

    /// How the server is.
    public private(set) var state = State.stopped {
        didSet {
            if state != oldValue { observers.values.forEach { $0.yield(state) } }
        }
    }
    /// Crashes since the controller was made.
    public private(set) var crashes = 0
    /// The process, while there is one.
    public var processIdentifier: Int32? { process?.identifier }
    public let configuration: ServerConfiguration

    private var process: ServerProcess?
    private var supervision: Task<Void, Never>?
    private var isStopping = false
    private var observers: [UUID: AsyncStream<State>.Continuation] = [:]
    /// The end of the log, for the message when it fails.
    private var lastLines: [String] = []

    /// A controller of a server that does not run yet.
    public init(_ configuration: ServerConfiguration) {
        self.configuration = configuration
    }

    /// The state now, and each new one.
    public var states: AsyncStream<State> {
        AsyncStream { continuation in
            let id = UUID()
            observers[id] = continuation
            continuation.yield(state)
            continuation.onTermination = { [weak self] _ in
                Task { [weak self] in await self?.forget(id) }
            }
        }
    }

    private func forget(_ id: UUID) {
        observers[id] = nil
    }

    /// Starts the server, unless it runs.
    public func start() {
        guard supervision == nil else { return }
        isStopping = false
        supervision = Task { await supervise() }
    }

    /// Stops the server and waits until it is gone.
    public func stop() async {
        guard let supervision else {
            state = .stopped
            return
        }
        isStopping = true
        state = .stopping
        process?.terminate()
        // Ends the pause before a restart.
        supervision.cancel()
        let grace = configuration.grace
        let killer = Task { [process] in
            try await Task.sleep(for: grace)
            process?.kill()
        }
        await supervision.value
        killer.cancel()
    }

    private func supervise() async {
        var policy = configuration.restarts
        while !isStopping {
            state = .starting
            let start = ContinuousClock.now
            let ending: String
            do {
                ending = try await runOnce()
            } catch {
                fail("it cannot be run: \(error.localizedDescription)")
                return
            }
            if isStopping { break }
            crashes += 1
            guard let pause = policy.crashed(after: ContinuousClock.now - start) else {
                fail("it crashed \(policy.crashes) times, the last time with \(ending). \(lastLines.joined(separator: "\n"))")
                return
            }
            state = .crashed(ending, restartIn: pause)
            try? await Task.sleep(for: pause)
        }
        supervision = nil
        state = .stopped
    }

    private func fail(_ message: String) {
        supervision = nil
        state = .failed(message)
    }

    /// Runs the server until it ends, and says how it did.
    private func runOnce() async throws -> String {
        let process = try ServerProcess(configuration.executable, configuration.commandLine)
        self.process = process
        defer { self.process = nil }
        lastLines = []
        // Not cancelled with this task: the process is stopped by signals, and is to be seen to its end.
        let events = process.events
        return await Task {
            for await event in events {
                switch event {
                case .line(let line): note(line)
                case .ended(let ending): return ending
                }
            }
            return "no status"
        }.value
    }

    private func note(_ line: String) {
        lastLines = lastLines.suffix(9) + [line]
        guard let entry = try? JSONDecoder().decode(LogEntry.self, from: Data(line.utf8)) else { return }
        if entry.event == "listening", let url = entry.url.flatMap(URL.init), state == .starting { state = .running(url) }
    }

    /// What the server's log says, as far as it matters here.
    private struct LogEntry: Decodable {
        let event: String
        let url: String?
    }
}
