import Foundation
import Testing

@testable import OMLX

/// The sample of the project's README.
@Suite struct Samples {
    private var readme: String {
        get throws {
            let text = try String(contentsOf: root.appendingPathComponent("README.md"), encoding: .utf8)
            let block = try #require(text.firstMatch(of: /```swift\n(?<code>(?s).*?)```/))
            return String(block.code)
        }
    }

    @Test func itIsShortAndTheOneThatRuns() throws {
        let file = root.appendingPathComponent("swift/Examples/Sample/main.swift")
        #expect(try readme == String(contentsOf: file, encoding: .utf8))
        #expect(try readme.split(separator: "\n", omittingEmptySubsequences: false).count - 1 <= 15)
    }

    @Test func itSaysWhatItShould() async throws {
        // The programs of the package lie beside the one that runs the tests.
        let folder = URL(fileURLWithPath: try FileManager.default.destinationOfSymbolicLink(atPath: "/proc/self/exe"))
            .deletingLastPathComponent()
        let output = try await blocking {
            let (process, pipe) = (Process(), Pipe())
            process.executableURL = folder.appendingPathComponent("Sample")
            process.standardOutput = pipe
            try process.run()
            let output = pipe.fileHandleForReading.readDataToEndOfFile()
            process.waitUntilExit()
            #expect(process.terminationStatus == 0)
            return String(decoding: output, as: UTF8.self)
        }
        #expect(output == "Tom's cat is called Luna.\nMia is 34.\n")
    }
}
