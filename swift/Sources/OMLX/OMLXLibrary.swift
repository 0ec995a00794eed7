import COMLX

/// The library as a whole.
public enum OMLXLibrary {
    /// Its version, such as "0.1.0".
    public static var version: String { text(omlx_version()) }

    /// The version of MLX that it needs, exactly.
    public static var mlxVersion: String { text(omlx_mlx_version()) }

    /// Throws `unsupported` if the library that was loaded is not the one this package was compiled against. A pool checks
    /// that when it is opened.
    public static func checkABI() throws {
        try check { omlx_check_abi(UInt32(OMLX_ABI_VERSION), $0) }
    }

    /// How serious a log line is.
    public enum LogLevel: UInt32, Sendable {
        case error = 1, warning, info, debug
    }

    /// Receives log lines up to a level, on any thread, several at once. It must not call the library. `nil` silences it.
    public static func setLog(
        upTo level: LogLevel = .info, _ receive: (@Sendable (LogLevel, String) -> Void)?
    ) throws {
        guard let receive else {
            return try check { omlx_set_log_hook(nil, level.rawValue, nil, nil, $0) }
        }
        let hook: omlx_log_fn = { data, level, message in
            lent(data, as: LogReceiver.self)?.receive(LogLevel(rawValue: level) ?? .debug, text(message))
        }
        try check { omlx_set_log_hook(hook, level.rawValue, lend(LogReceiver(receive)), takeBack, $0) }
    }
}

private final class LogReceiver: Sendable {
    let receive: @Sendable (OMLXLibrary.LogLevel, String) -> Void

    init(_ receive: @escaping @Sendable (OMLXLibrary.LogLevel, String) -> Void) {
        self.receive = receive
    }
}
