import Testing

@testable import OMLX

/// The one place where the library's threads and tasks meet.
@Suite struct Wakes {
    @Test func aSignalIsKept() async {
        let wake = Wake()
        wake.raise()
        wake.raise()
        // Two signals that nobody has heard are one.
        await wake.wait()
        let waiting = Task { await wake.wait() }
        wake.raise()
        await waiting.value
    }

    @Test func noneIsMissed() async {
        let (there, back) = (Wake(), Wake())
        let echo = Task {
            for _ in 0..<10_000 {
                await there.wait()
                back.raise()
            }
        }
        for _ in 0..<10_000 {
            there.raise()
            await back.wait()
        }
        await echo.value
    }
}
