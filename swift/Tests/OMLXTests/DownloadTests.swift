import Foundation
import Testing

@testable import OMLX

extension LibraryTests {
    /// Downloads, from a small hub of the tests.
    @Suite struct Downloads {
        static let files = [
            "config.json": Data(#"{"model_type":"qwen3"}"#.utf8),
            "tokenizer.json": Data(String(repeating: "fox ", count: 5000).utf8),
        ]

        /// A pool over an empty folder, and a download of a repository into it.
        private func download(
            from endpoint: String, _ repository: String = "org/tiny",
            _ body: (Download, EnginePool) async throws -> Void
        ) async throws {
            let folder = FileManager.default.temporaryDirectory.appendingPathComponent("omlx-\(UUID())")
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            defer { try? FileManager.default.removeItem(at: folder) }
            try await withPool(PoolOptions(modelsFolder: folder)) { pool, _ in
                var options = DownloadOptions(endpoint: endpoint)
                options.files = Self.files.keys.sorted()
                try await body(pool.download(repository, options: options), pool)
            }
        }

        @Test func aModelArrives() async throws {
            let hub = try Hub("org/tiny", files: Self.files, delay: 0.05)
            try await download(from: hub.endpoint) { download, pool in
                var states: [DownloadProgress] = []
                for await progress in download.updates { states.append(progress) }
                let last = try #require(states.last)
                #expect(last.state == .done)
                #expect(last.filesDone == 2 && last.filesTotal == 2)
                #expect(last.bytesDone == last.bytesTotal && last.bytesTotal == 20_022)
                #expect(states.count > 1)
                let result = try await download.result()
                #expect(result.id == "org/tiny" && result.commit == hub.commit && result.changed)
                for (name, content) in Self.files {
                    #expect(try Data(contentsOf: URL(fileURLWithPath: result.folder).appendingPathComponent(name)) == content)
                }
                #expect(try download.progress() == last)
                let kept = try JSONDecoder().decode(DownloadProgress.self, from: JSONEncoder().encode(last))
                #expect(kept == last)
                // It has no weights.
                #expect(try pool.models().first { $0.id == "org/tiny" }?.problem != nil)
            }
        }

        @Test func whatIsNotThereIsAnError() async throws {
            let hub = try Hub("org/tiny", files: Self.files)
            try await download(from: hub.endpoint, "org/nothing") { download, _ in
                var last: DownloadProgress?
                for await progress in download.updates { last = progress }
                #expect(last?.state == .failed)
                try await expect(.notFound) { try await download.result() }
            }
        }

        @Test func cancellingTheTaskCancelsIt() async throws {
            let hub = try Hub("org/tiny", files: Self.files, delay: 30)
            try await download(from: hub.endpoint) { download, _ in
                let task = Task { try await download.result() }
                #expect(try await eventually { try download.progress().state == .fetching })
                task.cancel()
                _ = try await failure(CancellationError.self) { try await task.value }
                #expect(try download.progress().state == .cancelled)
            }
            try await download(from: hub.endpoint) { download, _ in
                download.cancel()
                try await expect(.cancelled) { try await download.result() }
            }
        }

        @Test func aDownloadThatIsForgottenIsCancelled() async throws {
            let hub = try Hub("org/tiny", files: Self.files, delay: 30)
            let folder = FileManager.default.temporaryDirectory.appendingPathComponent("omlx-\(UUID())")
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            defer { try? FileManager.default.removeItem(at: folder) }
            try await withPool(PoolOptions(modelsFolder: folder)) { pool, _ in
                var download: Download? = try pool.download("org/tiny", options: DownloadOptions(endpoint: hub.endpoint))
                let updates = try #require(download).updates
                download = nil
                var last: DownloadProgress?
                for await progress in updates { last = progress }
                #expect(last?.state == .cancelled)
            }
        }

        @Test func withoutTheNetworkItIsOffline() async throws {
            try await withPool { pool, _ in
                var options = DownloadOptions()
                (options.isOffline, options.folder) = (true, FileManager.default.temporaryDirectory.path)
                let download = try pool.download("org/nothing", options: options)
                try await expect(.offline) { try await download.result() }
                #expect(throws: OMLXError.self) { try pool.download("") }
            }
        }
    }

    /// The hub of these tests names files as git does: known values.
    @Test func gitIDs() {
        #expect(gitID(Data()) == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
        #expect(gitID(Data("hello\n".utf8)) == "ce013625030ba8dba906f756967f9e9ca394464a")
        #expect(sha1(Data(String(repeating: "a", count: 119).utf8)).count == 20)
    }
}
