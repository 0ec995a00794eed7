import Foundation

#if canImport(Glibc)
import Glibc
#endif

/// A hub that has one repository of small files: as much of the protocol of the Hugging Face hub as downloads need. Each
/// connection gets one answer. It ends with the process.
final class Hub: Sendable {
    let endpoint: String
    let commit = String(repeating: "c0", count: 20)
    private let files: [String: Data]
    private let repository: String
    /// Seconds before each file.
    private let delay: Double

    init(_ repository: String, files: [String: Data], delay: Double = 0) throws {
        (self.repository, self.files, self.delay) = (repository, files, delay)
        let listener = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_addr.s_addr = inet_addr("127.0.0.1")
        var size = socklen_t(MemoryLayout<sockaddr_in>.size)
        let isListening = withUnsafeMutablePointer(to: &address) { address in
            address.withMemoryRebound(to: sockaddr.self, capacity: 1) { address in
                bind(listener, address, size) == 0 && listen(listener, 16) == 0 && getsockname(listener, address, &size) == 0
            }
        }
        guard isListening else { throw POSIXError(.EADDRNOTAVAIL) }
        endpoint = "http://127.0.0.1:\(UInt16(bigEndian: address.sin_port))"
        Thread.detachNewThread { [self] in
            while true {
                let connection = accept(listener, nil, nil)
                Thread.detachNewThread { [self] in
                    serve(connection)
                    close(connection)
                }
            }
        }
    }

    private func serve(_ connection: Int32) {
        var head = ""
        var buffer = [UInt8](repeating: 0, count: 4096)
        while !head.contains("\r\n\r\n") {
            let count = read(connection, &buffer, buffer.count)
            guard count > 0 else { return }
            head += String(decoding: buffer[..<count], as: UTF8.self)
        }
        let words = head.split(separator: " ", maxSplits: 2)
        let path = words[1].split(separator: "?")[0]
        var headers = "X-Repo-Commit: \(commit)\r\nConnection: close\r\n"
        var status = "404 Not Found"
        var body = Data()
        if path.hasPrefix("/api/models/\(repository)/revision/") {
            (status, body) = ("200 OK", listing())
        } else if let content = files[path.split(separator: "/").last.map(String.init) ?? ""] {
            Thread.sleep(forTimeInterval: delay)
            (status, body) = ("200 OK", content)
            headers += "ETag: \"\(gitID(content))\"\r\n"
            if let range = head.firstMatch(of: /(?i)range: bytes=(\d+)-(\d+)/), let first = Int(range.1), let last = Int(range.2),
                last < content.count
            {
                (status, body) = ("206 Partial Content", content[first...last])
                headers += "Content-Range: bytes \(first)-\(last)/\(content.count)\r\n"
            }
        }
        var answer = Data("HTTP/1.1 \(status)\r\n\(headers)Content-Length: \(body.count)\r\n\r\n".utf8)
        if words[0] != "HEAD" { answer += body }
        answer.withUnsafeBytes { bytes in
            // A client may be gone; that must not be a signal.
            _ = send(connection, bytes.baseAddress, bytes.count, Int32(MSG_NOSIGNAL))
        }
    }

    private func listing() -> Data {
        let siblings = files.map { name, content in
            #"{"rfilename":"\#(name)","size":\#(content.count),"blobId":"\#(gitID(content))"}"#
        }
        return Data(#"{"id":"\#(repository)","sha":"\#(commit)","siblings":[\#(siblings.joined(separator: ","))]}"#.utf8)
    }
}

/// The id that git gives a file of this content.
func gitID(_ content: Data) -> String {
    sha1(Data("blob \(content.count)\0".utf8) + content).map { String(format: "%02x", $0) }.joined()
}

/// SHA-1 (FIPS 180-4).
func sha1(_ message: Data) -> [UInt8] {
    var state: [UInt32] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0]
    var padded = [UInt8](message) + [0x80]
    padded += [UInt8](repeating: 0, count: (120 - padded.count % 64) % 64)
    padded += withUnsafeBytes(of: UInt64(message.count * 8).bigEndian) { Array($0) }
    for block in stride(from: 0, to: padded.count, by: 64) {
        var words = (0..<16).map { word in
            (0..<4).reduce(UInt32(0)) { $0 << 8 | UInt32(padded[block + word * 4 + $1]) }
        }
        for index in 16..<80 {
            let mixed = words[index - 3] ^ words[index - 8] ^ words[index - 14] ^ words[index - 16]
            words.append(mixed << 1 | mixed >> 31)
        }
        var (a, b, c, d, e) = (state[0], state[1], state[2], state[3], state[4])
        for (index, word) in words.enumerated() {
            let (choice, constant): (UInt32, UInt32) =
                switch index {
                case ..<20: (b & c | ~b & d, 0x5a82_7999)
                case ..<40: (b ^ c ^ d, 0x6ed9_eba1)
                case ..<60: (b & c | b & d | c & d, 0x8f1b_bcdc)
                default: (b ^ c ^ d, 0xca62_c1d6)
                }
            let next = (a << 5 | a >> 27) &+ choice &+ e &+ constant &+ word
            (e, d, c, b, a) = (d, c, b << 30 | b >> 2, a, next)
        }
        state = zip(state, [a, b, c, d, e]).map { $0 &+ $1 }
    }
    return state.flatMap { value in withUnsafeBytes(of: value.bigEndian) { Array($0) } }
}
