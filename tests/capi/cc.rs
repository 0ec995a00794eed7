//! Compiles and runs C and C++ programs. `CC` and `CXX` choose the compilers.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

/// What every program must compile with.
pub const STRICT: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-pedantic"];

/// Sanitizers that end a program with the first thing they find.
pub const SANITIZERS: [&str; 2] = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

/// Name of the shared library as the build makes it and the linker looks for it.
const FILE_NAME: &str = if cfg!(target_os = "macos") { "libomlx.dylib" } else { "libomlx.so" };

/// Name of the shared library as the loader looks for it: what it calls itself.
pub fn soname() -> String {
    let (tool, flag) = if cfg!(target_os = "macos") { ("otool", "-D") } else { ("readelf", "-d") };
    let output = Command::new(tool).arg(flag).arg(library()).env("LC_ALL", "C").output().expect("the tool starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let name = match cfg!(target_os = "macos") {
        true => text.trim().rsplit_once("@rpath/").map(|(_, name)| name),
        false => text.split_once("soname: [").and_then(|(_, rest)| rest.split(']').next()),
    };
    name.unwrap_or_else(|| panic!("no name in {text}")).to_owned()
}

/// No program of these tests needs longer, on the slowest machine they are meant for, unless it is told to do more.
const LIMIT: Duration = Duration::from_secs(240);

/// How long a program may take: [`LIMIT`], or 20 minutes where the environment asks for long counts.
fn limit() -> Duration {
    if std::env::var_os("OMLX_CHURN").is_some() { 5 * LIMIT } else { LIMIT }
}

/// Held for reading by whatever loads the machine, for writing by what measures times.
static MACHINE: RwLock<()> = RwLock::new(());

fn busy() -> RwLockReadGuard<'static, ()> {
    MACHINE.read().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Waits until no other test compiles or runs a program, and keeps it so.
pub fn quiet() -> RwLockWriteGuard<'static, ()> {
    MACHINE.write().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The project's folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A folder for files of these tests, inside the target folder.
pub fn work_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi");
        fs::create_dir_all(&dir).expect("a folder for the tests");
        dir
    })
}

/// The shared library that cargo built for this test: it lies beside the test program.
pub fn library() -> PathBuf {
    let program = std::env::current_exe().expect("the test program's path");
    let library = program.parent().expect("a folder").join(FILE_NAME);
    assert!(library.is_file(), "{} was not built", library.display());
    library
}

/// A folder with the library under the names that the linker and the loader look for.
fn library_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = work_dir().join("lib");
        fs::create_dir_all(&dir).expect("a folder for the library");
        for name in [FILE_NAME.to_owned(), soname()] {
            let link = dir.join(name);
            if link.symlink_metadata().is_ok() {
                fs::remove_file(&link).expect("the old link can go");
            }
            std::os::unix::fs::symlink(library(), &link).expect("a link to the library");
        }
        dir
    })
}

/// The compiler for C or C++, from the environment or the system's; options may follow the name.
fn compiler(cxx: bool) -> Command {
    let (variable, default) = if cxx { ("CXX", "c++") } else { ("CC", "cc") };
    let value = std::env::var(variable).unwrap_or_else(|_| default.to_owned());
    let mut words = value.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or(default));
    command.args(words);
    command
}

/// Where the headers are, behind what a program's own flags say.
fn includes() -> [OsString; 2] {
    ["include", "bindings/cpp"].map(|folder| {
        let mut flag = OsString::from("-I");
        flag.push(root().join(folder));
        flag
    })
}

/// Checks `source` with `flags` without making a program; the compiler's messages if it refuses.
pub fn check(source: &Path, cxx: bool, flags: &[&str]) -> Result<(), String> {
    let _busy = busy();
    let mut compiler = compiler(cxx);
    let output =
        compiler.args(flags).args(includes()).arg("-fsyntax-only").arg(source).output().expect("the compiler starts");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Makes the program `name` of a C or C++ file, linked to the library; the compiler's messages if it fails.
pub fn try_compile(source: &Path, name: &str, flags: &[&str]) -> Result<PathBuf, String> {
    let _busy = busy();
    let program = work_dir().join(name);
    let mut run_path = OsString::from("-Wl,-rpath,");
    run_path.push(library_dir());
    let output = compiler(source.extension().is_some_and(|extension| extension == "cpp"))
        .args(flags)
        .args(includes())
        .arg(source)
        .arg("-L")
        .arg(library_dir())
        .args(["-lomlx", "-lpthread"])
        .arg(run_path)
        .arg("-o")
        .arg(&program)
        .output()
        .expect("the compiler starts");
    if output.status.success() { Ok(program) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Makes the program `name` of a C or C++ file with all warnings as errors.
pub fn compile(source: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let flags: Vec<_> = STRICT.iter().chain(flags).copied().collect();
    try_compile(source, name, &flags).unwrap_or_else(|messages| panic!("{}:\n{messages}", source.display()))
}

/// What a program did.
pub struct Outcome {
    /// It ended with code 0.
    pub success: bool,
    /// What it wrote.
    pub stdout: String,
    /// What it wrote to the error output.
    pub stderr: String,
}

/// The loader's search path with `folder` in front. Cargo puts its own folders there, where an older build of the
/// library may lie, and the loader looks there before it looks where the program says.
fn search_path(folder: &Path) -> (&'static str, OsString) {
    let name = if cfg!(target_os = "macos") { "DYLD_LIBRARY_PATH" } else { "LD_LIBRARY_PATH" };
    let old = std::env::var_os(name).unwrap_or_default();
    let folders = std::iter::once(folder.to_owned()).chain(std::env::split_paths(&old).filter(|f| f.is_absolute()));
    (name, std::env::join_paths(folders).expect("no separator in the names of folders"))
}

/// Runs a program in the project's folder; one that hangs is ended and fails the test.
pub fn run(program: &Path, args: &[&str]) -> Outcome {
    run_with(program, args, library_dir())
}

/// As [`run`], with the library in `folder`.
pub fn run_with(program: &Path, args: &[&str], folder: &Path) -> Outcome {
    run_in(program, args, folder, Stdio::null())
}

/// As [`run`], with a text to read.
pub fn run_with_input(program: &Path, args: &[&str], input: &str) -> Outcome {
    let path = program.with_extension("in");
    fs::write(&path, input).expect("a file for the input");
    run_in(program, args, library_dir(), File::open(path).expect("the input").into())
}

/// As [`run`], while nothing else runs.
pub fn run_alone(_quiet: &RwLockWriteGuard<'static, ()>, program: &Path, args: &[&str]) -> Outcome {
    start(program, args, library_dir(), Stdio::null(), &[])
}

/// Has glibc overwrite memory that is freed, at once, so that it shows where the library uses it afterwards.
const OVERWRITE_FREED: [(&str, &str); 2] =
    [("MALLOC_PERTURB_", "165"), ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")];

fn run_in(program: &Path, args: &[&str], folder: &Path, input: Stdio) -> Outcome {
    let _busy = busy();
    start(program, args, folder, input, &OVERWRITE_FREED)
}

fn start(program: &Path, args: &[&str], folder: &Path, input: Stdio, variables: &[(&str, &str)]) -> Outcome {
    let name = |kind: &str| program.with_extension(kind);
    let file = |kind: &str| File::create(name(kind)).expect("a file for the output");
    let mut child = Command::new(program)
        .args(args)
        .envs([search_path(folder)])
        .envs(variables.iter().copied())
        // A program with a sanitizer does not start behind another library.
        .env_remove("LD_PRELOAD")
        .current_dir(root())
        .stdin(input)
        .stdout(file("out"))
        .stderr(file("err"))
        .spawn()
        .expect("the program starts");
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("the program can be waited for") {
            break status;
        }
        if started.elapsed() > limit() {
            child.kill().expect("the program can be ended");
            panic!("{} hangs; it wrote: {}", program.display(), fs::read_to_string(name("err")).unwrap_or_default());
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let text = |kind: &str| String::from_utf8_lossy(&fs::read(name(kind)).expect("the output")).into_owned();
    Outcome { success: status.success(), stdout: text("out"), stderr: text("err") }
}

/// Runs a program that must end with code 0.
pub fn run_ok(program: &Path, args: &[&str]) -> Outcome {
    let outcome = run(program, args);
    assert!(outcome.success, "{}:\n{}\n{}", program.display(), outcome.stdout, outcome.stderr);
    outcome
}
