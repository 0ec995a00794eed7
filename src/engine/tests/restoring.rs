//! Rows come back from the cold tier while that is faster than computing them.

use std::io;

use super::*;
use crate::cache::hot::HotTier;
use crate::cache::ssd::{Access, ColdOptions, ColdTier, Folder, FolderLock, Listed, Storage, StorageFile};

/// A folder whose files take as long to read as a test wants.
#[derive(Debug)]
struct SlowFolder {
    folder: Folder,
    delay: Arc<Mutex<Duration>>,
}

#[derive(Debug)]
struct SlowFile {
    file: Box<dyn StorageFile>,
    delay: Arc<Mutex<Duration>>,
}

impl SlowFolder {
    fn slow(&self, file: Box<dyn StorageFile>) -> Box<dyn StorageFile> {
        Box::new(SlowFile { file, delay: Arc::clone(&self.delay) })
    }
}

impl Storage for SlowFolder {
    fn place(&self) -> String {
        self.folder.place()
    }

    fn lock(&self) -> io::Result<Option<FolderLock>> {
        self.folder.lock()
    }

    fn create(&self, name: &str, access: Access) -> io::Result<Box<dyn StorageFile>> {
        self.folder.create(name, access)
    }

    fn open(&self, name: &str, access: Access) -> io::Result<Box<dyn StorageFile>> {
        Ok(self.slow(self.folder.open(name, access)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.folder.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.folder.remove(name)
    }

    fn list(&self, folder: &str) -> io::Result<Vec<Listed>> {
        self.folder.list(folder)
    }

    fn create_folder(&self, name: &str) -> io::Result<()> {
        self.folder.create_folder(name)
    }

    fn sync_folder(&self, name: &str) -> io::Result<()> {
        self.folder.sync_folder(name)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.folder.free_bytes()
    }

    fn total_bytes(&self) -> io::Result<u64> {
        self.folder.total_bytes()
    }
}

impl StorageFile for SlowFile {
    fn read_at(&self, place: u64, out: &mut [u8]) -> io::Result<()> {
        std::thread::sleep(*lock(&self.delay));
        self.file.read_at(place, out)
    }

    fn write_at(&self, place: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(place, bytes)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn modified(&self) -> io::Result<u64> {
        self.file.modified()
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

/// An engine of the bundled model with a cold tier in `storage`, that weighs rates.
fn engine_over(storage: impl Storage + 'static) -> Engine {
    let source = ModelSource::Folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat"));
    let tier = ColdTier::open(Arc::new(storage), ColdOptions::new(1 << 30)).unwrap();
    let tiers = Tiers {
        hot: Arc::new(HotTier::new(0)),
        cold: Some(Cold::new(tier, 64 << 20, 1).unwrap()),
        write_through: false,
        always_restore: false,
        namespace: Vec::new(),
    };
    let engine = Engine::start(EngineOptions {
        id: "weighs".to_owned(),
        text: Arc::new(LazyText::new(source.clone(), ModelKind::Llm, None)),
        source,
        kind: ModelKind::Llm,
        device: Device::Cpu,
        dtype: None,
        backend: Backend::Cpu(Cpu::new(None, Precision::Fast)),
        context: None,
        prefill_chunk: 128,
        block_tokens: 32,
        cache_bytes: 256 << 20,
        max_sequences: 1,
        queue_length: 4,
        target_latency: Duration::from_millis(50),
        overlap: false,
        tiers,
        ledger: Ledger::new(4 << 30),
        turns: Turns::new(false),
    });
    let engine = engine.unwrap();
    engine.wait_ready().unwrap();
    let known = || engine.cache(|answer| CacheCommand::Find(vec![1, 2], answer)).unwrap().stopped_by;
    while known() == Stop::NotIdentified {
        std::thread::sleep(Duration::from_millis(2));
    }
    engine
}

/// Nobody says that rows are to be restored: a disk that is faster than the model is read, and one that is slower is not,
/// once that has been noticed.
#[test]
fn rows_come_from_the_disk_while_that_is_faster() {
    const PROMPT: usize = 600;
    let (folder, delay) = (tempfile::tempdir().unwrap(), Arc::new(Mutex::new(Duration::ZERO)));
    let engine = engine_over(SlowFolder { folder: Folder::new(folder.path()).unwrap(), delay: Arc::clone(&delay) });
    let prompt: Vec<usize> = (0..PROMPT).map(|n| 5 + n * 11 % 1000).collect();
    let json = format!(r#"{{"prompt":{prompt:?},"max_tokens":4,"temperature":0,"ignore_eos":true}}"#);
    let ask = || {
        let begun = Instant::now();
        let (tokens, done) = finish(&engine.submit(request(&json)).unwrap());
        (tokens, done.usage.cached_tokens, begun.elapsed())
    };
    let (expected, cached, computed) = ask();
    assert_eq!(cached, 0);
    let ask_again = || {
        assert!(engine.cache(CacheCommand::Save).unwrap());
        let find = || engine.cache(|answer| CacheCommand::Find(prompt.iter().map(|&n| n as u32).collect(), answer));
        let deadline = Instant::now() + PATIENCE;
        engine.cache(CacheCommand::Clear).unwrap();
        while find().unwrap().cold < PROMPT - 1 {
            assert!(Instant::now() < deadline, "nothing is written");
            std::thread::sleep(Duration::from_millis(2));
        }
        let (tokens, cached, _) = ask();
        assert_eq!(tokens, expected);
        cached
    };
    assert_eq!(ask_again(), PROMPT - 1, "a fast disk");
    // Much slower than the model; this time nobody knows yet.
    *lock(&delay) = 5 * computed;
    assert_eq!(ask_again(), PROMPT - 1, "as fast as it was");
    assert_eq!(ask_again(), 0, "a slow disk");
}

/// Tokens that come back of a prompt of 41 whose rows are in `folder`, asked for as soon as the pool is open, and what is said
/// of the model then.
fn cached_at_once(folder: &Path, id: &str) -> (usize, String) {
    let tiers = TierOptions { folder: Some(folder.to_owned()), always_restore: true, ..TierOptions::default() };
    let options = PoolOptions { device: Some(Device::Cpu), block_tokens: Some(8), tiers, ..Default::default() };
    let pool = EnginePool::open(options).unwrap();
    pool.add_model(&fixture("qwen3-f32"), Some(id)).unwrap();
    let json = format!(r#"{{"prompt":{:?},"max_tokens":2}}"#, (1..42).collect::<Vec<_>>());
    let cached = finish(&pool.generate(request(&json)).unwrap()).1.usage.cached_tokens;
    let found = pool.cache_find(&request(r#"{"prompt":[42,41,40]}"#)).unwrap();
    // Not of a model that is never identified.
    let _ = pool.cache_flush(None, PATIENCE);
    pool.close();
    (cached, found)
}

/// What was computed before a restart is not computed again because a request is there before the model's files are read.
#[test]
fn a_request_waits_until_the_model_is_identified() {
    let (folder, id) = (tempfile::tempdir().unwrap(), "identified");
    (0..4).for_each(|_| crate::fault::arm("identity.slow", id, 0));
    let (cached, found) = cached_at_once(folder.path(), id);
    assert!(cached == 0 && found.contains("not_identified"), "nothing to wait for: {cached} {found}");
    crate::fault::arm("identity.slow", id, 0);
    assert_eq!(cached_at_once(folder.path(), id).0, 40);
    crate::fault::arm("identity.slow", id, 0);
    crate::fault::arm("identity.fails", id, 0);
    assert_eq!(cached_at_once(folder.path(), id).0, 0, "it never is");
}

#[test]
fn a_request_does_not_wait_for_ever_until_the_model_is_identified() {
    let (folder, id) = (tempfile::tempdir().unwrap(), "identified-late");
    assert_eq!(cached_at_once(folder.path(), id).0, 0);
    assert_eq!(cached_at_once(folder.path(), id).0, 40);
    // Eight seconds.
    (0..16).for_each(|_| crate::fault::arm("identity.slow", id, 0));
    assert_eq!(cached_at_once(folder.path(), id).0, 0);
}
