//! How much memory there is, and how much of it the models may have.

use std::path::Path;

use sysinfo::{MemoryRefreshKind, Pid, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System};

use super::cgroup::GroupMemory;
use super::policy::Pressure;
use crate::error::{Error, Result};
use crate::mlx::{self, Device};

/// What `auto` leaves to the rest of a large system.
const FOR_OTHERS: u64 = 8 << 30;

/// The system is under pressure where less than this part of its memory is available.
const LITTLE: f64 = 0.05;

/// And under strong pressure here.
const VERY_LITTLE: f64 = 0.02;

/// Share of the last ten seconds in which something waited for memory, in percent (Linux's pressure stall information).
const STALLED: f64 = 10.0;

/// How much memory models, caches and their work may take.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum MemoryLimit {
    /// What the system can spare: all but 8 GiB, at least half, and never more than is available now. On a GPU with memory
    /// of its own: what MLX would use of it.
    #[default]
    Auto,
    /// So many bytes.
    Bytes(u64),
    /// A part of the memory, in percent.
    Percent(f64),
}

/// How the machine's memory stands.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Reading {
    /// Bytes that this process could ever have: of the machine, or of its container.
    pub total: u64,
    /// Bytes that nobody needs at present.
    pub available: u64,
    /// Bytes of this process.
    pub footprint: u64,
    /// How short everybody is.
    pub pressure: Pressure,
}

/// Who knows how the memory stands.
pub trait Machine: Send {
    /// How it stands now.
    fn read(&mut self) -> Reading;
}

/// The machine that this process runs on.
#[derive(Debug)]
pub struct ThisMachine {
    system: System,
}

impl Default for ThisMachine {
    /// Reads nothing yet.
    fn default() -> Self {
        Self { system: System::new_with_specifics(RefreshKind::nothing()) }
    }
}

impl Machine for ThisMachine {
    fn read(&mut self) -> Reading {
        self.system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
        let process = Pid::from_u32(std::process::id());
        self.system.refresh_processes_specifics(
            ProcessesToUpdate::Some(&[process]),
            false,
            ProcessRefreshKind::nothing().with_memory(),
        );
        let (total, available) = (self.system.total_memory(), self.system.available_memory());
        let (total, available) = within(GroupMemory::read(Path::new("/")), total, available);
        let footprint = self.system.process(process).map_or(0, sysinfo::Process::memory);
        Reading { total, available, footprint, pressure: pressure(total, available) }
    }
}

/// What a container leaves of a machine's `total` and `available` bytes.
fn within(container: Option<GroupMemory>, total: u64, available: u64) -> (u64, u64) {
    container.map_or((total, available), |own| (total.min(own.limit), available.min(own.available)))
}

fn pressure(total: u64, available: u64) -> Pressure {
    let share = available as f64 / total.max(1) as f64;
    let level = mlx::memory_pressure_level();
    let stalled = stalled(Path::new("/proc/pressure/memory")).unwrap_or(0.0);
    if level >= 4 || share < VERY_LITTLE {
        Pressure::Much
    } else if level >= 2 || share < LITTLE || stalled >= STALLED {
        Pressure::Some
    } else {
        Pressure::None
    }
}

/// `avg10` of the line "some avg10=0.00 avg60=…".
fn stalled(file: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(file).ok()?;
    let word = text.lines().next()?.split_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
    word.parse().ok()
}

impl MemoryLimit {
    /// Checks what a host asked for.
    pub(super) fn check(self) -> Result<()> {
        match self {
            Self::Percent(percent) if !(percent > 0.0 && percent <= 100.0) => {
                Err(Error::invalid_argument(format!("a memory limit of {percent} percent")))
            }
            _ => Ok(()),
        }
    }

    /// The limit in bytes, where the models have `own` bytes already.
    pub(super) fn bytes(self, device: Device, reading: &Reading, own: u64) -> u64 {
        let apart = device.has_own_memory();
        let total = if apart { mlx::memory_limit() } else { reading.total };
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => (total as f64 * percent / 100.0) as u64,
            Self::Auto if apart => total,
            Self::Auto => {
                let spared = total.saturating_sub(FOR_OTHERS).max(total / 2);
                spared.min(reading.available.saturating_add(own))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1 << 30;

    #[test]
    fn auto_leaves_something_for_others() {
        let limit = |total: u64, available: u64, own: u64| {
            let reading = Reading { total: total * GB, available: available * GB, ..Reading::default() };
            MemoryLimit::Auto.bytes(Device::Cpu, &reading, own * GB) / GB
        };
        assert_eq!(limit(64, 60, 0), 56);
        assert_eq!(limit(8, 8, 0), 4, "half of a small machine");
        assert_eq!(limit(64, 20, 0), 20, "others have the rest");
        assert_eq!(limit(64, 10, 20), 30, "what we have is ours");
        let reading = Reading { total: 10 * GB, ..Reading::default() };
        assert_eq!(MemoryLimit::Percent(30.0).bytes(Device::Cpu, &reading, 0), 3 * GB);
        assert_eq!(MemoryLimit::Bytes(7).bytes(Device::Cpu, &reading, 0), 7);
        assert!(MemoryLimit::Percent(0.0).check().is_err() && MemoryLimit::Percent(f64::NAN).check().is_err());
        assert!(MemoryLimit::Percent(100.0).check().is_ok());
    }

    #[test]
    fn a_container_has_the_last_word() {
        let container = |limit: u64, available: u64| Some(GroupMemory { limit: limit * GB, available: available * GB });
        let read = |container| {
            let (total, available) = within(container, 64 * GB, 60 * GB);
            let reading = Reading { total, available, ..Reading::default() };
            (total / GB, available / GB, MemoryLimit::Auto.bytes(Device::Cpu, &reading, 0) / GB)
        };
        assert_eq!(read(None), (64, 60, 56));
        assert_eq!(read(container(4, 3)), (4, 3, 2));
        assert_eq!(read(container(4, 1)), (4, 1, 1), "others in the container have the rest");
        assert_eq!(read(container(4, 0)), (4, 0, 0), "it is full");
        assert_eq!(read(container(100, 99)), (64, 60, 56), "it may have more than there is");
    }

    #[test]
    fn this_machine_is_read() {
        let mut machine = ThisMachine::default();
        let mut readings = std::iter::repeat_with(|| {
            let before = machine.read();
            let block = std::hint::black_box(vec![1u8; 200 << 20]);
            let after = machine.read();
            drop(block);
            (before, after)
        });
        // Other tests of this process take and give back memory of their own meanwhile.
        let counted = |(before, after): &(Reading, Reading)| {
            assert!(
                before.total >= before.available && before.available > 0 && before.footprint > 1 << 20,
                "{before:?}"
            );
            (180 << 20..220 << 20).contains(&after.footprint.saturating_sub(before.footprint))
        };
        let last = readings.next().unwrap();
        assert!(counted(&last) || readings.take(20).any(|both| counted(&both)), "{last:?}");
    }

    #[test]
    fn stalls_are_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "some avg10=12.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00\n").unwrap();
        assert_eq!(stalled(file.path()), Some(12.5));
        std::fs::write(file.path(), "nothing of the kind").unwrap();
        assert_eq!((stalled(file.path()), stalled(Path::new("/nowhere"))), (None, None));
        assert_eq!(pressure(1000, 15), Pressure::Much);
        assert!(pressure(1000, 40) >= Pressure::Some);
    }
}
