import Foundation

/// Which server is run, and how.
public struct ServerConfiguration: Sendable, Hashable {
    /// The program `omlx-server`.
    public var executable: URL
    /// More of its options, such as "--models" and a folder.
    public var arguments: [String]
    /// 0 takes a free one.
    public var port: Int
    /// Of the models, in whose place a request that names none is answered.
    public var defaultModel: String?
    /// Running requests may take so long to end when the server is stopped; then it is killed.
    public var grace: Duration
    public var restarts: RestartPolicy
    /// Before all else on the command line; tests run scripts that way.
    var commandLinePrefix: [String] = []

    /// A server on this machine's own address.
    public init(
        executable: URL, arguments: [String] = [], port: Int = 8000, defaultModel: String? = nil,
        grace: Duration = .seconds(35), restarts: RestartPolicy = RestartPolicy()
    ) {
        self.executable = executable
        self.arguments = arguments
        self.port = port
        self.defaultModel = defaultModel
        self.grace = grace
        self.restarts = restarts
    }

    /// What the program is called with. The log is JSON, because the controller reads from it where the server listens.
    var commandLine: [String] {
        commandLinePrefix + ["serve", "--port", String(port), "--log-format", "json"]
            + (defaultModel.map { ["--default-model", $0] } ?? []) + arguments
    }
}

/// When a server that has crashed is started again: after a pause that doubles with each crash, and not at all any more after
/// too many that came quickly.
public struct RestartPolicy: Sendable, Hashable {
    public var firstPause: Duration
    public var longestPause: Duration
    /// A server that ran so long was well: the counting begins anew.
    public var healthyAfter: Duration
    /// So many crashes in a row are a reason to give up.
    public var mostCrashes: Int
    /// Crashes in a row so far.
    public private(set) var crashes = 0

    /// A policy.
    public init(
        firstPause: Duration = .milliseconds(500), longestPause: Duration = .seconds(30),
        healthyAfter: Duration = .seconds(60), mostCrashes: Int = 6
    ) {
        self.firstPause = firstPause
        self.longestPause = longestPause
        self.healthyAfter = healthyAfter
        self.mostCrashes = mostCrashes
    }

    /// Counts a crash of a server that ran for `uptime`. The pause before it is started again, or `nil` to give up.
    public mutating func crashed(after uptime: Duration) -> Duration? {
        if uptime >= healthyAfter { crashes = 0 }
        crashes += 1
        guard crashes < mostCrashes else { return nil }
        // More doublings would overflow, and are beyond any limit that makes sense.
        return min(firstPause * (1 << min(crashes - 1, 20)), longestPause)
    }
}
