import Testing

@testable import OMLXServer

@Suite struct RestartPolicies {
    @Test func pausesDoubleUpToALimit() {
        var policy = RestartPolicy(firstPause: .seconds(1), longestPause: .seconds(5), mostCrashes: 100)
        let pauses = (0..<5).map { _ in policy.crashed(after: .zero) }
        #expect(pauses == [.seconds(1), .seconds(2), .seconds(4), .seconds(5), .seconds(5)])
        for _ in 0..<80 { #expect(policy.crashed(after: .zero) == .seconds(5)) }
    }

    @Test func tooManyInARowAreTheEnd() {
        var policy = RestartPolicy(mostCrashes: 3)
        #expect(policy.crashed(after: .zero) != nil)
        #expect(policy.crashed(after: .zero) != nil)
        #expect(policy.crashed(after: .zero) == nil)
    }

    @Test func aServerThatRanForLongWasWell() {
        var policy = RestartPolicy(firstPause: .seconds(1), healthyAfter: .seconds(60), mostCrashes: 3)
        for _ in 0..<10 { #expect(policy.crashed(after: .seconds(61)) == .seconds(1)) }
        #expect(policy.crashed(after: .seconds(59)) == .seconds(2))
    }
}
