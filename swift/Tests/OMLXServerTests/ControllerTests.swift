import Foundation
import Testing

@testable import OMLXServer

/// A controller of a shell script in the server's place.
private func controller(
    _ script: String, _ policy: RestartPolicy = quick, grace: Duration = .seconds(30)
) -> ServerController {
    var configuration = ServerConfiguration(
        executable: URL(fileURLWithPath: "/bin/sh"), grace: grace, restarts: policy)
    configuration.commandLinePrefix = ["-c", script, "omlx-server"]
    return ServerController(configuration)
}

private let quick = RestartPolicy(firstPause: .milliseconds(20), mostCrashes: 4)
private let listening = #"echo '{"event":"listening","url":"http://127.0.0.1:1"}' >&2; "#
private let address = URL(string: "http://127.0.0.1:1")!

/// The first state for which `condition` holds; none within twenty seconds is a failure.
@discardableResult
func wait(
    for controller: ServerController, _ location: SourceLocation = #_sourceLocation,
    until condition: @escaping @Sendable (ServerController.State) -> Bool
) async -> ServerController.State {
    let states = await controller.states
    let found = await withTaskGroup(of: ServerController.State?.self) { group in
        group.addTask { await states.first(where: condition) }
        group.addTask {
            try? await Task.sleep(for: .seconds(20))
            return nil
        }
        defer { group.cancelAll() }
        return await group.next() ?? nil
    }
    let state = await controller.state
    if found == nil { Issue.record("the server is \(state)", sourceLocation: location) }
    return found ?? state
}

extension ServerController.State {
    var isCrashed: Bool {
        if case .crashed = self { true } else { false }
    }

    var isFailed: Bool {
        if case .failed = self { true } else { false }
    }
}

/// Restarts and endings, with scripts that do on purpose what servers should not.
@Suite struct Controllers {
    @Test func aServerIsStartedAndStopped() async throws {
        let controller = controller(listening + "exec sleep 60")
        #expect(await controller.state == .stopped)
        await controller.start()
        await controller.start()
        await wait(for: controller) { $0 == .running(address) }
        let process = try #require(await controller.processIdentifier)
        #expect(kill(process, 0) == 0)
        // It ends when it is asked to: the grace is longer.
        let clock = ContinuousClock.now
        await controller.stop()
        #expect(ContinuousClock.now - clock < .seconds(10))
        #expect(await controller.state == .stopped)
        #expect(kill(process, 0) != 0)
        #expect(await controller.crashes == 0)
        // And again.
        await controller.start()
        await wait(for: controller) { $0 == .running(address) }
        await controller.stop()
        await controller.stop()
        #expect(await controller.state == .stopped)
    }

    @Test func aServerThatIsKilledIsStartedAgain() async throws {
        let controller = controller(listening + "exec sleep 60")
        await controller.start()
        await wait(for: controller) { $0 == .running(address) }
        let first = try #require(await controller.processIdentifier)
        kill(first, SIGKILL)
        let crash = await wait(for: controller) { $0.isCrashed }
        #expect(crash == .crashed("signal 9", restartIn: .milliseconds(20)))
        await wait(for: controller) { $0 == .running(address) }
        #expect(await controller.processIdentifier != first)
        #expect(await controller.crashes == 1)
        await controller.stop()
    }

    @Test func aServerThatCannotStartIsGivenUp() async throws {
        let controller = controller("echo 'no such folder: models' >&2; exit 3")
        await controller.start()
        guard case .failed(let message) = await wait(for: controller, until: { $0.isFailed }) else { return }
        #expect(message.contains("status 3") && message.contains("no such folder: models"))
        #expect(await controller.crashes == 4)
        // It may be tried anew.
        await controller.start()
        await wait(for: controller) { $0.isCrashed }
        await controller.stop()
        #expect(await controller.state == .stopped)
    }

    @Test func aProgramThatIsNotThereIsAFailure() async throws {
        let controller = ServerController(ServerConfiguration(executable: URL(fileURLWithPath: "/no/such/omlx-server")))
        await controller.start()
        await wait(for: controller) { $0.isFailed }
        #expect(await controller.crashes == 0)
    }

    @Test func aServerThatDoesNotListenToSignalsIsKilled() async throws {
        let script = "trap '' TERM; " + listening + "while :; do sleep 0.05; done"
        let controller = controller(script, grace: .milliseconds(300))
        await controller.start()
        await wait(for: controller) { $0 == .running(address) }
        let clock = ContinuousClock.now
        await controller.stop()
        #expect(await controller.state == .stopped)
        #expect((.milliseconds(300)...(.seconds(10))).contains(ContinuousClock.now - clock))
    }

    @Test func stoppingEndsThePauseBeforeARestart() async throws {
        let controller = controller("exit 1", RestartPolicy(firstPause: .seconds(600), longestPause: .seconds(600)))
        await controller.start()
        await wait(for: controller) { $0.isCrashed }
        await controller.stop()
        #expect(await controller.state == .stopped)
    }
}
