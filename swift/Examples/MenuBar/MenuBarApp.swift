// The sample app: a server in the menu bar of a Mac. Nothing but views; what they show and do is OMLXServer's MenuBarModel.

#if canImport(SwiftUI)
import OMLXServer
import SwiftUI

@main struct MenuBarApp: App {
    @State private var model = MenuBarModel(ServerController(MenuBarApp.configuration))

    var body: some Scene {
        MenuBarExtra("omlx", systemImage: "brain") {
            ServerView(model: model)
                .frame(width: 360)
                .task { await model.follow() }
        }
        .menuBarExtraStyle(.window)
    }

    /// The server beside this program, with the models of the app's bundle; or the one that OMLX_SERVER names.
    private static var configuration: ServerConfiguration {
        let named = ProcessInfo.processInfo.environment["OMLX_SERVER"].map { URL(fileURLWithPath: $0) }
        let beside = Bundle.main.executableURL?.deletingLastPathComponent().appendingPathComponent("omlx-server")
        let models = Bundle.main.url(forResource: "models", withExtension: nil)
        return ServerConfiguration(
            executable: named ?? beside ?? URL(fileURLWithPath: "/usr/local/bin/omlx-server"),
            arguments: named == nil ? models.map { ["--models", $0.path] } ?? [] : [])
    }
}

struct ServerView: View {
    @Bindable var model: MenuBarModel

    var body: some View {
        VStack(alignment: .leading, spacing: 8) {
            Text(model.status).font(.headline)
            if let activity = model.activity { Text(activity).font(.caption).foregroundStyle(.secondary) }
            HStack {
                Button("Start") { Task { await model.start() } }.disabled(!model.canStart)
                Button("Stop") { Task { await model.stop() } }.disabled(!model.canStop)
                Spacer()
                Button("Quit") {
                    Task {
                        await model.stop()
                        NSApplication.shared.terminate(nil)
                    }
                }
            }
            Divider()
            ChatView(model: model)
        }
        .padding()
    }
}

struct ChatView: View {
    @Bindable var model: MenuBarModel

    var body: some View {
        ScrollView {
            LazyVStack(alignment: .leading, spacing: 6) {
                ForEach(model.chat) { line in
                    Text(line.text)
                        .textSelection(.enabled)
                        .frame(maxWidth: .infinity, alignment: line.role == .user ? .trailing : .leading)
                }
            }
        }
        .frame(height: 240)
        .defaultScrollAnchor(.bottom)
        if let problem = model.problem { Text(problem).font(.caption).foregroundStyle(.red) }
        HStack {
            TextField("Ask", text: $model.draft).onSubmit { model.send() }
            if model.isAnswering { Button("Stop answer") { model.cancelAnswer() } }
        }
    }
}
#else
@main struct MenuBarApp {
    static func main() {
        print("The menu bar is on macOS.")
    }
}
#endif
