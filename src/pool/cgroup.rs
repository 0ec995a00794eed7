//! What Linux's control groups leave to this process: each may limit the memory of all groups within it, so a container's own
//! group is not all that counts.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// What the groups of a process leave to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GroupMemory {
    /// Bytes that it could ever have: the least limit.
    pub limit: u64,
    /// Bytes that nobody needs at present, of the group in which that is least.
    pub available: u64,
}

/// The files of a version of the memory controller.
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// In `memory.stat`: files that the system keeps in memory count as used, and go when they must.
    cached: [&'static str; 2],
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cached: ["total_active_file", "total_inactive_file"],
};

const V2: Files = Files { limit: "memory.max", usage: "memory.current", cached: ["active_file", "inactive_file"] };

impl GroupMemory {
    /// Of this process on a machine whose files are below `root`; `None` if no group has a limit.
    pub fn read(root: &Path) -> Option<Self> {
        let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
        let mounts = fs::read_to_string(root.join("proc/self/mountinfo")).ok()?;
        let folders = mounts.lines().filter_map(|mount| own_folders(mount, &groups));
        let limits = folders.flat_map(|(folders, files)| folders.into_iter().map(move |folder| (folder, files)));
        let limits = limits.filter_map(|(folder, files)| Self::of_group(&root.join(folder), files));
        limits.reduce(|a, b| Self { limit: a.limit.min(b.limit), available: a.available.min(b.available) })
    }

    fn of_group(folder: &Path, files: &Files) -> Option<Self> {
        let text = |name| fs::read_to_string(folder.join(name)).unwrap_or_default();
        // "max" is none.
        let limit = text(files.limit).trim().parse().ok()?;
        let used: u64 = text(files.usage).trim().parse().unwrap_or(0);
        let stat = text("memory.stat");
        let numbers = stat.lines().filter_map(|line| line.split_once(' '));
        let cached = numbers.filter(|(name, _)| files.cached.contains(name));
        let cached: u64 = cached.filter_map(|(_, bytes)| bytes.parse::<u64>().ok()).sum();
        Some(Self { limit, available: limit.saturating_sub(used.saturating_sub(cached)) })
    }
}

/// The folders of the process's group and of those around it, without their leading slash, if a line of `mountinfo` is a mount of
/// memory controllers. `groups`: its lines of `/proc/self/cgroup`.
fn own_folders(mount: &str, groups: &str) -> Option<(Vec<PathBuf>, &'static Files)> {
    let (mount, file_system) = mount.split_once(" - ")?;
    let mut words = mount.split(' ').skip(3);
    let (top, place) = (words.next()?, words.next()?);
    let mut words = file_system.split(' ');
    let (kind, options) = (words.next()?, words.nth(1)?);
    let (controller, files) = match kind {
        "cgroup2" => ("", &V2),
        "cgroup" if options.split(',').any(|option| option == "memory") => ("memory", &V1),
        _ => return None,
    };
    let group = groups.lines().find_map(|line| {
        let (controllers, group) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|name| name == controller).then_some(group)
    })?;
    // A container may see its own group as the top, whatever it is called, and those around it not at all.
    let below = Path::new(group).strip_prefix(top).unwrap_or(Path::new(""));
    let below = if below.components().all(|part| matches!(part, Component::Normal(_))) { below } else { Path::new("") };
    let folder = Path::new(place.trim_start_matches('/')).join(below);
    let around = below.components().count();
    Some((folder.ancestors().take(around + 1).map(Path::to_owned).collect(), files))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// A made-up machine.
    struct Tree(tempfile::TempDir);

    impl Tree {
        /// Its process is in `groups`, and it has `mounts`.
        fn new(groups: &str, mounts: &str) -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            tree.write("proc/self", "cgroup", groups);
            let disk = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n";
            tree.write("proc/self", "mountinfo", &format!("{disk}{mounts}"));
            tree
        }

        fn write(&self, folder: &str, name: &str, text: &str) {
            let folder = self.0.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(name), text).unwrap();
        }

        /// A group below `sys/fs/cgroup`: its limit, what it has, and how much of that are files, in MB.
        fn group(&self, files: &Files, folder: &str, limit: &str, used: u64, cached: u64) {
            let folder = format!("sys/fs/cgroup/{folder}");
            self.write(&folder, files.limit, &format!("{limit}\n"));
            self.write(&folder, files.usage, &format!("{}\n", used * MB));
            let [active, inactive] = files.cached;
            let half = cached * MB / 2;
            let stat = format!("anon 1\n{active} {half}\nfile_mapped 7\n{inactive} {half}\n");
            self.write(&folder, "memory.stat", &stat);
        }

        /// Limit and what is available, in MB.
        fn read(&self) -> Option<(u64, u64)> {
            GroupMemory::read(self.0.path()).map(|memory| (memory.limit / MB, memory.available / MB))
        }
    }

    const MOUNT_V2: &str = "30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn the_least_limit_of_all_groups_around_holds() {
        let tree = Tree::new("0::/pods/pod/app\n", MOUNT_V2);
        assert_eq!(tree.read(), None, "no files at all");
        tree.group(&V2, "pods/pod/app", "max", 900, 0);
        assert_eq!(tree.read(), None, "no limit");
        tree.group(&V2, "pods/pod/other", "1000000", 0, 0);
        assert_eq!(tree.read(), None, "the process is not in that group");
        tree.group(&V2, "pods/pod", "4000000000", 3000, 2000);
        assert_eq!(tree.read(), Some((4000, 3000)), "two thirds of what is used are files");
        tree.group(&V2, "pods", "8000000000", 7500, 0);
        assert_eq!(tree.read(), Some((4000, 500)), "others have the rest");
        tree.group(&V2, "pods/pod/app", "2000000000", 900, 0);
        assert_eq!(tree.read(), Some((2000, 500)));
        tree.group(&V2, "", "1500000000", 2000, 0);
        assert_eq!(tree.read(), Some((1500, 0)), "the top, as a container sees its own, and it is full");
    }

    #[test]
    fn version_1_is_read_too() {
        let groups = "12:cpu,cpuacct:/other\n5:memory,hugetlb:/docker/own/app\n1:name=systemd:/other\n0::/other\n";
        let mounts = "40 30 0:35 /docker/own /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory,hugetlb\n\
            41 30 0:36 / /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu,cpuacct\n";
        let tree = Tree::new(groups, mounts);
        tree.group(&V1, "cpu", "1000000", 0, 0);
        tree.group(&V1, "cpu/docker/own/app", "1000000", 0, 0);
        tree.group(&V2, "memory/app", "1000000", 0, 0);
        assert_eq!(tree.read(), None, "another controller, and files of the other version");
        tree.group(&V1, "memory/app", "9223372036854771712", 100, 0);
        assert!(tree.read().is_some_and(|(limit, _)| limit > 1 << 40), "what it says where there is none");
        tree.group(&V1, "memory", "3000000000", 1000, 500);
        assert_eq!(tree.read(), Some((3000, 2500)));
    }

    #[test]
    fn a_group_outside_of_the_mount_is_its_top() {
        for group in ["/../../other", "/elsewhere"] {
            let mount =
                if group == "/elsewhere" { MOUNT_V2.replace(" / /sys", " /own /sys") } else { MOUNT_V2.to_owned() };
            let tree = Tree::new(&format!("0::{group}\n"), &mount);
            tree.group(&V2, "", "4000000000", 1000, 0);
            tree.group(&V2, "elsewhere", "1000000", 0, 0);
            assert_eq!(tree.read(), Some((4000, 3000)), "{group}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_no_limit() {
        assert_eq!(GroupMemory::read(Path::new("/nowhere")), None);
        for (groups, mounts) in [("", MOUNT_V2), ("nonsense\n0\n", MOUNT_V2), ("0::/a\n", "nonsense\n1 2 - cgroup2\n")]
        {
            let tree = Tree::new(groups, mounts);
            tree.group(&V2, "", "4000000000", 1000, 0);
            assert_eq!(tree.read(), None, "{groups:?} {mounts:?}");
        }
        let tree = Tree::new("0::/\n", MOUNT_V2);
        tree.write("sys/fs/cgroup", V2.limit, "4000000000\n");
        assert_eq!(tree.read(), Some((4000, 4000)), "nobody says what is used");
    }
}
