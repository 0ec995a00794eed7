//! The library starts no child process. A test program of its own: children are counted per process.

#[path = "../capi/host.rs"]
mod host;

use std::process::{Command, Stdio};

use host::Pool;

/// What this process knows of children that it had and has.
#[derive(Debug, PartialEq)]
struct Children {
    /// Largest memory of any child that has ended and was waited for, in kilobytes; no child, no memory.
    ended_max_rss: i64,
    /// Ids of children that are alive or were not waited for.
    present: Vec<String>,
}

const NONE: Children = Children { ended_max_rss: 0, present: Vec::new() };

fn children() -> Children {
    // SAFETY: `rusage` is plain numbers, so all zero bytes are a value of it; the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage), 0);
        usage
    };
    Children { ended_max_rss: usage.ru_maxrss as i64, present: present() }
}

/// Linux lists the children of every thread.
#[cfg(target_os = "linux")]
fn present() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("/proc is mounted");
    // A thread that ends while this runs takes no child with it: the list of another thread inherits it.
    let lists = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// Elsewhere a child that is there can be waited for.
#[cfg(not(target_os = "linux"))]
fn present() -> Vec<String> {
    // SAFETY: no status is asked for, and with WNOWAIT nothing is changed.
    let found = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::waitid(libc::P_ALL, 0, &mut info, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT)
    };
    if found == 0 { vec!["some".to_owned()] } else { Vec::new() }
}

#[test]
fn the_library_starts_no_child_process() {
    assert_eq!(children(), NONE, "before anything was done");
    let pool = Pool::open();
    let text = pool.answer(r#"{"messages":[{"role":"user","content":"Tell me a joke."}],"max_tokens":8,"seed":1}"#);
    assert!(!text.is_empty());
    assert_eq!(children(), NONE, "after a generation");
    pool.unload();
    drop(pool);
    assert_eq!(children(), NONE, "after the pool was closed");

    // Both parts of the check see a child: one that runs, and one that has ended.
    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("a program that waits for input");
    assert_eq!(children().present.len(), 1);
    drop(child.stdin.take());
    assert!(child.wait().expect("it ends").success());
    let after = children();
    assert!(after.present.is_empty() && after.ended_max_rss > 0, "{after:?}");
}
