//! Buffers at the edge of what a process may touch: one element further is a page without any access, and the rest of
//! the buffer's own pages is checked for changes. An access out of bounds ends the test program with SIGSEGV.

use std::ops::{Deref, DerefMut};

/// Where a buffer touches its protected page. An end is as unaligned as the buffer's length makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// The last element is the last one before the page.
    End,
    /// The first element is the first one after the page.
    Begin,
}

/// Both edges.
pub const EDGES: [Edge; 2] = [Edge::End, Edge::Begin];

/// What fills the pages around the elements.
const FILLER: u8 = 0xa5;

/// Elements in pages of their own between two protected pages.
pub struct Guarded<T> {
    map: *mut u8,
    /// Bytes between the protected pages.
    room: usize,
    data: *mut T,
    len: usize,
}

fn page() -> usize {
    // SAFETY: no memory is involved.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).expect("a page size")
}

impl<T: Copy> Guarded<T> {
    /// A copy of `values`.
    pub fn new(values: &[T], edge: Edge) -> Self {
        let (page, bytes) = (page(), size_of_val(values));
        let room = bytes.next_multiple_of(page).max(page);
        // SAFETY: a new mapping; its inner pages are made accessible and written, and the elements lie within them.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
            let map = libc::mmap(std::ptr::null_mut(), room + 2 * page, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
            let map = map.cast::<u8>();
            let inner = map.add(page);
            let done = libc::mprotect(inner.cast(), room, libc::PROT_READ | libc::PROT_WRITE);
            assert_eq!(done, 0, "mprotect: {}", std::io::Error::last_os_error());
            inner.write_bytes(FILLER, room);
            let data = match edge {
                Edge::End => inner.add(room - bytes),
                Edge::Begin => inner,
            };
            let data = data.cast::<T>();
            data.copy_from_nonoverlapping(values.as_ptr(), values.len());
            Self { map, room, data, len: values.len() }
        }
    }
}

impl<T> Guarded<T> {
    /// Whether the bytes around the elements are as they were.
    fn is_intact(&self) -> bool {
        // SAFETY: the accessible pages of the mapping.
        let all = unsafe { std::slice::from_raw_parts(self.map.add(page()), self.room) };
        let before = self.data as usize - all.as_ptr() as usize;
        let after = before + self.len * size_of::<T>();
        all[..before].iter().chain(&all[after..]).all(|&byte| byte == FILLER)
    }
}

impl<T> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements were written there.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        let intact = self.is_intact();
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.map.cast(), self.room + 2 * page()) };
        if !std::thread::panicking() {
            assert!(intact, "bytes around a buffer were changed");
        }
    }
}

/// Runs `action` in a child process and returns the signal that ended it, if one did.
fn signal_of_child(action: impl FnOnce()) -> Option<i32> {
    // SAFETY: the child only runs `action` and leaves without unwinding or running destructors.
    unsafe {
        match libc::fork() {
            -1 => panic!("fork: {}", std::io::Error::last_os_error()),
            0 => {
                // The standard library's handler looks for stack overflows first.
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                libc::signal(libc::SIGBUS, libc::SIG_DFL);
                let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                libc::setrlimit(libc::RLIMIT_CORE, &none);
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
                libc::_exit(i32::from(outcome.is_err()))
            }
            child => {
                let mut status = 0;
                assert_eq!(libc::waitpid(child, &mut status, 0), child, "waitpid");
                if libc::WIFSIGNALED(status) {
                    return Some(libc::WTERMSIG(status));
                }
                assert_eq!(libc::WEXITSTATUS(status), 0, "the child panicked");
                None
            }
        }
    }
}

/// Whether `action` dies of an access to a protected page.
fn is_fatal(action: impl FnOnce()) -> bool {
    match signal_of_child(action) {
        None => false,
        Some(signal) if signal == libc::SIGSEGV || signal == libc::SIGBUS => true,
        Some(signal) => panic!("ended by signal {signal}"),
    }
}

/// Reads the element `at` elements from the first.
fn read<T: Copy>(buffer: &Guarded<T>, at: isize) {
    // SAFETY: none: it is called in a child process that must die of it.
    std::hint::black_box(unsafe { buffer.data.offset(at).read_volatile() });
}

#[test]
fn one_element_out_of_bounds_is_fatal() {
    for len in [1usize, 3, 4095, 4096, 70_000] {
        let values = vec![7u8; len];
        let (end, begin) = (Guarded::new(&values, Edge::End), Guarded::new(&values, Edge::Begin));
        let past = isize::try_from(len).expect("a small number");
        assert!(!is_fatal(|| read(&end, 0)) && !is_fatal(|| read(&end, past - 1)));
        assert!(!is_fatal(|| read(&begin, 0)) && !is_fatal(|| read(&begin, past - 1)));
        assert!(is_fatal(|| read(&end, past)), "a read past {len} bytes");
        assert!(is_fatal(|| read(&begin, -1)), "a read before {len} bytes");
        // SAFETY: none, as in `read`.
        assert!(is_fatal(|| unsafe { end.data.add(len).write_volatile(1) }), "a write past {len} bytes");
        // SAFETY: none, as in `read`.
        assert!(is_fatal(|| unsafe { begin.data.sub(1).write_volatile(1) }), "a write before {len} bytes");
    }
    let floats = Guarded::new(&[1f32; 5], Edge::End);
    assert!(is_fatal(|| read(&floats, 5)) && !is_fatal(|| read(&floats, 4)));
}

#[test]
fn changes_around_a_buffer_are_noticed() {
    for edge in EDGES {
        let mut buffer = Guarded::new(&[1u16; 3], edge);
        buffer[2] = 2;
        assert!(buffer.is_intact() && *buffer == [1, 1, 2]);
        // SAFETY: inside the mapping's accessible pages, on the side that is not protected.
        unsafe {
            match edge {
                Edge::End => buffer.data.sub(1).write(0),
                Edge::Begin => buffer.data.add(3).write(0),
            }
        }
        assert!(!buffer.is_intact(), "{edge:?}");
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(buffer)));
        assert!(caught.is_err(), "{edge:?}: dropping it fails the test");
    }
}

/// A kernel whose activations are one row longer than their memory dies of it, so that the guard would notice.
#[test]
fn a_kernel_that_reads_too_far_is_fatal() {
    use crate::cpu::floats::{Floats, FloatsMut};
    use crate::cpu::matmul::{Finish, MatMul, Precision, Projection};
    use crate::cpu::matrix::{Matrix, Storage};

    let columns = 17;
    let weights = vec![1f32; columns];
    for isa in crate::cpu::Isa::available() {
        let workers = crate::threads::workers(1);
        let x = Guarded::new(&vec![1f32; 2 * columns], Edge::End);
        let product = |rows: usize| {
            let matrix = Matrix { rows: 1, columns, storage: Storage::Dense(Floats::F32(&weights)) };
            // SAFETY: only for two rows; with three a child process must die of it.
            let x = unsafe { std::slice::from_raw_parts(x.data, rows * columns) };
            let projections = [Projection { matrix, bias: None }];
            let (finish, precision) = (Finish::Concat, Precision::Exact);
            let product = MatMul { x, projections: &projections, experts: None, stacked: 1, finish, precision };
            let mut out = vec![0f32; rows];
            product.run(isa, &workers, FloatsMut::F32(&mut out));
            assert_eq!(out[..2], [17.0; 2]);
        };
        assert!(!is_fatal(|| product(2)), "{isa:?}");
        assert!(is_fatal(|| product(3)), "{isa:?}");
    }
}
