import Foundation

#if canImport(SwiftUI)
import Observation
#endif

/// What a menu shows of a server, and what can be done there: all of the sample app but its views.
// Observed where there are views. (On Linux, nothing that needs Swift 6.0's libswiftObservation can be linked.)
#if canImport(SwiftUI)
@Observable
#endif
@MainActor public final class MenuBarModel {
    /// How the server is.
    public private(set) var state = ServerController.State.stopped
    /// The newest numbers; `nil` while it does not run.
    public private(set) var stats: ServerStats?
    /// The chat so far.
    public private(set) var chat: [ChatLine] = []
    /// What went wrong with the last question.
    public private(set) var problem: String?
    /// What is being typed.
    public var draft = ""

    private let controller: ServerController
    private let interval: Duration
    private var answer: Task<Void, Never>?

    /// A model of a server, of which it asks for numbers every `interval`.
    public init(_ controller: ServerController, interval: Duration = .seconds(2)) {
        self.controller = controller
        self.interval = interval
    }

    /// Follows the server until the task is cancelled: what a view does as long as it is there.
    public func follow() async {
        await withTaskGroup(of: Void.self) { group in
            group.addTask {
                for await state in await self.controller.states { await self.set(state) }
            }
            group.addTask {
                while !Task.isCancelled {
                    await self.refresh()
                    try? await Task.sleep(for: self.interval)
                }
            }
        }
    }

    private func set(_ state: ServerController.State) {
        self.state = state
        if client == nil { stats = nil }
    }

    private func refresh() async {
        guard let client else { return }
        let newest = try? await client.stats()
        // It may have been stopped meanwhile.
        stats = self.client == nil ? nil : newest
    }

    /// Starts the server.
    public func start() async {
        await controller.start()
    }

    /// Stops the server and waits until it is gone.
    public func stop() async {
        cancelAnswer()
        await controller.stop()
    }

    /// One line about the server.
    public var status: String {
        switch state {
        case .stopped: "Stopped"
        case .starting: "Starting…"
        case .running(let url): "Running at \(url.absoluteString)"
        case .crashed(let ending, let pause):
            "Crashed (\(ending)), starts again in \(pause.formatted(.units(allowed: [.seconds, .milliseconds])))"
        case .stopping: "Stopping…"
        case .failed(let message): "Failed: \(message)"
        }
    }

    /// One line about what it is doing.
    public var activity: String? {
        stats.map { stats in
            let used = Int64(clamping: stats.pool.memory.used).formatted(.byteCount(style: .memory))
            let models = stats.pool.models.keys.sorted().joined(separator: ", ")
            return "\(models.isEmpty ? "no model loaded" : models) · \(stats.requests) requests · \(used)"
        }
    }

    public var canStart: Bool {
        switch state {
        case .stopped, .failed: true
        default: false
        }
    }

    public var canStop: Bool { !canStart && state != .stopping }
    public var isAnswering: Bool { answer != nil }

    private var client: ServerClient? {
        guard case .running(let url) = state else { return nil }
        return ServerClient(url)
    }

    /// Sends the draft; the answer grows in the chat's last line.
    public func send() {
        let question = draft.trimmingCharacters(in: .whitespacesAndNewlines)
        guard let client, !question.isEmpty, answer == nil else { return }
        draft = ""
        problem = nil
        chat.append(ChatLine(.user, question))
        let messages = chat
        chat.append(ChatLine(.assistant, ""))
        answer = Task {
            do {
                for try await text in client.chat(messages) { chat[chat.count - 1].text += text }
            } catch {
                // What a connection says that was closed on purpose is none.
                if !Task.isCancelled { problem = error.localizedDescription }
            }
            if chat.last?.text.isEmpty == true { chat.removeLast() }
            answer = nil
        }
    }

    /// Ends the answer that is under way; what has come stays.
    public func cancelAnswer() {
        answer?.cancel()
    }

    /// Waits for the answer that is under way.
    func waitForAnswer() async {
        await answer?.value
    }
}
