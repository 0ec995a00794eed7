import Foundation
import Testing

@testable import OMLXServer

/// The program that OMLX_SERVER names, or the release build of this project.
private let server: URL = {
    let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
        .deletingLastPathComponent().deletingLastPathComponent()
    let named = ProcessInfo.processInfo.environment["OMLX_SERVER"].map { URL(fileURLWithPath: $0) }
    return named ?? root.appendingPathComponent("target/release/omlx-server")
}()

private func controller(_ arguments: [String] = []) -> ServerController {
    ServerController(
        ServerConfiguration(
            executable: server, arguments: ["--device", "cpu"] + arguments, port: 0, defaultModel: "tiny-chat",
            restarts: RestartPolicy(firstPause: .milliseconds(20), mostCrashes: 2)))
}

/// What the sample app does, with the real server, but for its views.
@MainActor @Suite(.serialized) struct MenuBars {
    private func model(
        _ arguments: [String] = [], _ body: (MenuBarModel, ServerController) async throws -> Void
    ) async throws {
        let controller = controller(arguments)
        let model = MenuBarModel(controller, interval: .milliseconds(50))
        let following = Task { await model.follow() }
        do {
            try await body(model, controller)
        } catch {
            await model.stop()
            throw error
        }
        await model.stop()
        #expect(await eventually { model.status == "Stopped" && model.stats == nil && model.canStart })
        following.cancel()
        await following.value
    }

    private func eventually(_ condition: @MainActor () -> Bool) async -> Bool {
        for _ in 0..<2000 where !condition() { try? await Task.sleep(for: .milliseconds(10)) }
        return condition()
    }

    @Test func aServerRunsAndAnswers() async throws {
        try await model { model, _ in
            #expect(model.canStart && !model.canStop && model.activity == nil)
            model.draft = "Is anybody there?"
            model.send()
            #expect(model.chat.isEmpty)
            await model.start()
            #expect(await eventually { model.stats != nil })
            #expect(model.status.hasPrefix("Running at http://127.0.0.1:"))
            #expect(!model.canStart && model.canStop)
            model.draft = " What is 12 plus 30? "
            model.send()
            #expect(model.isAnswering && model.draft.isEmpty)
            await model.waitForAnswer()
            #expect(model.chat.map(\.role) == [.user, .assistant] && model.problem == nil)
            #expect(model.chat[0].text == "What is 12 plus 30?")
            #expect(model.chat[1].text.contains("42"))
            #expect(await eventually { model.stats?.completionTokens ?? 0 > 3 })
            try check(#require(model.stats))
            #expect(await eventually { model.activity?.hasPrefix("tiny-chat · 0 requests · ") == true })
        }
    }

    @Test func itComesBackAfterACrash() async throws {
        try await model { model, controller in
            await model.start()
            #expect(await eventually { model.stats != nil })
            let process = try #require(await controller.processIdentifier)
            kill(process, SIGKILL)
            await wait(for: controller) { $0.isCrashed }
            #expect(await eventually { model.stats == nil })
            #expect(await eventually { model.stats != nil })
            #expect(await controller.crashes == 1)
            model.draft = "What is 12 plus 30?"
            model.send()
            await model.waitForAnswer()
            #expect(model.chat.last?.text.contains("42") == true)
        }
    }

    @Test func anAnswerIsCancelled() async throws {
        try await model(["--max-sequences", "1"]) { model, _ in
            await model.start()
            #expect(await eventually { model.stats != nil })
            model.draft = "Write these as bullet points: lamp, river, horse, bread, clock, garden"
            model.send()
            #expect(await eventually { model.chat.last?.text.isEmpty == false })
            model.cancelAnswer()
            await model.waitForAnswer()
            #expect(!model.isAnswering)
            #expect(model.problem == nil)
            #expect(await eventually { model.stats?.requests == 0 })
        }
    }

    @Test func whatTheServerRefusesIsAProblem() async throws {
        try await model(["--context-length", "16"]) { model, _ in
            await model.start()
            #expect(await eventually { model.stats != nil })
            model.draft = String(repeating: "fox and hound ", count: 30)
            model.send()
            await model.waitForAnswer()
            #expect(model.chat.map(\.role) == [.user])
            #expect(model.problem?.isEmpty == false)
        }
    }

    @Test func aModelThatIsNotThereIsAFailure() async throws {
        let controller = controller(["--models", "/no/such/folder"])
        let model = MenuBarModel(controller)
        let following = Task { await model.follow() }
        await model.start()
        #expect(await eventually { model.status.hasPrefix("Failed: ") })
        #expect(model.status.contains("/no/such/folder"))
        following.cancel()
    }

    private func check<Value: Codable & Equatable>(_ value: Value) throws {
        #expect(try JSONDecoder().decode(Value.self, from: JSONEncoder().encode(value)) == value)
    }

    @Test func statesCanBeKept() throws {
        let address = try #require(URL(string: "http://127.0.0.1:8000"))
        let states: [ServerController.State] = [
            .stopped, .running(address), .crashed("signal 9", restartIn: .milliseconds(20)), .failed("no such file"),
        ]
        try states.forEach { try check($0) }
    }

    @Test func linesOfAStreamAreRead() {
        #expect(EventStream.text(of: #"data: {"choices":[{"delta":{"content":"a\nb"}}]}"#) == "a\nb")
        for line in ["", ": comment", "data: [DONE]", "data: {}", #"data: {"choices":[{"delta":{}}]}"#, "event: x"] {
            #expect(EventStream.text(of: line) == nil)
        }
    }
}
