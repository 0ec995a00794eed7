import COMLX
import Foundation

/// A copy of a text that the library returned, which is freed.
func take(_ string: OpaquePointer?) -> String {
    defer { omlx_string_release(string) }
    guard let data = omlx_string_data(string) else { return "" }
    return text(data, count: omlx_string_len(string))
}

/// A copy of `count` bytes of UTF-8.
func text(_ bytes: UnsafePointer<CChar>?, count: Int) -> String {
    String(decoding: UnsafeRawBufferPointer(start: bytes, count: bytes == nil ? 0 : count), as: UTF8.self)
}

/// A copy of a text that ends with a NUL character.
func text(_ string: UnsafePointer<CChar>?) -> String {
    string.map { String(cString: $0) } ?? ""
}

/// A copy of `count` values.
func copy<Value>(_ values: UnsafePointer<Value>?, count: Int) -> [Value] {
    Array(UnsafeBufferPointer(start: values, count: values == nil ? 0 : count))
}

/// Calls `body` with a C string, or NULL for `nil`. A text with a NUL character would be cut: it is refused.
func withOptionalCString<Result>(_ text: String?, _ body: (UnsafePointer<CChar>?) throws -> Result) throws -> Result {
    guard let text else { return try body(nil) }
    guard !text.utf8.contains(0) else {
        throw OMLXError(.invalidArgument, "\(text.debugDescription) has a NUL character")
    }
    return try text.withCString(body)
}

/// Calls `body` with the bytes of a text and their number.
func withBytes<Result>(of text: String, _ body: (UnsafePointer<CChar>?, Int) throws -> Result) rethrows -> Result {
    var text = text
    return try text.withUTF8 { bytes in
        try bytes.withMemoryRebound(to: CChar.self) { try body($0.baseAddress, $0.count) }
    }
}

/// A value that the library described as JSON.
func decode<Value: Decodable>(_ type: Value.Type, from json: String) throws -> Value {
    do {
        return try JSONDecoder().decode(type, from: Data(json.utf8))
    } catch {
        throw OMLXError(.internal, "the library's description of a \(type) cannot be read: \(error)")
    }
}
