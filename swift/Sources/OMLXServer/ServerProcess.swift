import Foundation

/// A running child process, and the lines it writes to standard error.
final class ServerProcess: @unchecked Sendable {
    // Unchecked: `Process` is used from here for signals only, which may be sent from any thread; what its handlers share
    // is behind `lock`.
    enum Event: Sendable {
        case line(String)
        /// The last one: the exit status, or the signal.
        case ended(String)
    }

    /// What happens, for one reader.
    let events: AsyncStream<Event>
    private let process = Process()
    private let output = Pipe()
    private let continuation: AsyncStream<Event>.Continuation
    private let lock = NSLock()
    private var partial = Data()
    private var isSilent = false
    private var ending: String?

    /// Starts `executable`. Its standard input is empty.
    init(_ executable: URL, _ arguments: [String]) throws {
        (events, continuation) = AsyncStream.makeStream()
        process.executableURL = executable
        process.arguments = arguments
        process.standardInput = FileHandle.nullDevice
        process.standardOutput = FileHandle.nullDevice
        process.standardError = output
        output.fileHandleForReading.readabilityHandler = { [weak self] handle in
            let data = handle.availableData
            if data.isEmpty { handle.readabilityHandler = nil }
            self?.read(data)
        }
        process.terminationHandler = { [weak self] process in
            let reason = process.terminationReason == .uncaughtSignal ? "signal" : "status"
            self?.finish { $0.ending = "\(reason) \(process.terminationStatus)" }
            // Its output may be held open by a child of its own: that is not waited for.
            DispatchQueue.global().asyncAfter(deadline: .now() + 1) { [weak self] in self?.finish { $0.isSilent = true } }
        }
        do {
            try withoutBlockedSignals { try process.run() }
        } catch {
            output.fileHandleForReading.readabilityHandler = nil
            continuation.finish()
            throw error
        }
    }

    var identifier: Int32 { process.processIdentifier }

    /// Asks it to end.
    func terminate() {
        if process.isRunning { process.terminate() }
    }

    /// Ends it.
    func kill() {
        if process.isRunning { _ = Foundation.kill(process.processIdentifier, SIGKILL) }
    }

    private func read(_ data: Data) {
        guard !data.isEmpty else { return finish { $0.isSilent = true } }
        lock.lock()
        partial += data
        var lines: [String] = []
        while let end = partial.firstIndex(of: 10) {
            lines.append(String(decoding: partial[partial.startIndex..<end], as: UTF8.self))
            partial = Data(partial[partial.index(after: end)...])
        }
        lock.unlock()
        lines.forEach { continuation.yield(.line($0)) }
    }

    /// Tells of the end once the process has ended and its output, too.
    private func finish(_ change: (ServerProcess) -> Void) {
        lock.lock()
        change(self)
        let ending = isSilent ? self.ending : nil
        lock.unlock()
        guard let ending else { return }
        continuation.yield(.ended(ending))
        continuation.finish()
    }
}

/// Runs `body` on this thread with no signal blocked: a child inherits the mask of the thread that starts it, and the threads
/// that run Swift's tasks on Linux block SIGTERM.
private func withoutBlockedSignals(_ body: () throws -> Void) rethrows {
    var (none, before) = (sigset_t(), sigset_t())
    sigemptyset(&none)
    pthread_sigmask(SIG_SETMASK, &none, &before)
    defer { pthread_sigmask(SIG_SETMASK, &before, nil) }
    try body()
}
