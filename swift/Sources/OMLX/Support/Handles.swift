import COMLX

/// Counts references to C objects that Swift holds, so that tests see what leaks.
final class HandleCount: Sendable {
    static let pools = HandleCount()
    static let requests = HandleCount()
    static let downloads = HandleCount()
    /// Objects that the library holds until it calls their `destroy`.
    static let callbacks = HandleCount()

    private let count = Locked(0)

    var value: Int { count.withLock { $0 } }

    func add(_ difference: Int) {
        count.withLock { $0 += difference }
    }
}

// Unchecked, all three: the library's functions may be called from any thread, several at once; the pointer never changes, and
// is released in `deinit`, when nobody can use it any more.

/// A reference to a pool.
final class PoolHandle: @unchecked Sendable {
    let pointer: OpaquePointer

    init(owning pointer: OpaquePointer) {
        self.pointer = pointer
        HandleCount.pools.add(1)
    }

    deinit {
        omlx_pool_release(pointer)
        HandleCount.pools.add(-1)
    }
}

/// A reference to a download; the last one cancels it.
final class DownloadHandle: @unchecked Sendable {
    let pointer: OpaquePointer

    init(owning pointer: OpaquePointer) {
        self.pointer = pointer
        HandleCount.downloads.add(1)
    }

    deinit {
        omlx_download_release(pointer)
        HandleCount.downloads.add(-1)
    }
}

/// Gives `object` to the library as `user_data`; `takeBack`, called by its destroy function, ends that.
func lend<Object: AnyObject>(_ object: Object) -> UnsafeMutableRawPointer {
    HandleCount.callbacks.add(1)
    return Unmanaged.passRetained(object).toOpaque()
}

/// The object behind a `user_data` that `lend` made, during a callback.
func lent<Object: AnyObject>(_ pointer: UnsafeMutableRawPointer?, as _: Object.Type) -> Object? {
    pointer.map { Unmanaged<Object>.fromOpaque($0).takeUnretainedValue() }
}

/// The destroy function of every `user_data` that `lend` made.
let takeBack: @convention(c) (UnsafeMutableRawPointer?) -> Void = { pointer in
    guard let pointer else { return }
    Unmanaged<AnyObject>.fromOpaque(pointer).release()
    HandleCount.callbacks.add(-1)
}
