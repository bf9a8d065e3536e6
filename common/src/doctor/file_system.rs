//! What sort of file system a SQLite ledger lies on, by the number that the kernel gives for it.

/// What a file system is to a ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileSystem {
    /// Locks and shared memory cannot be trusted.
    Remote(&'static str),
    /// It keeps nothing, or not for long.
    Fleeting(&'static str),
    /// Nothing is known against it.
    Local,
}

const REMOTE: [(u32, &str); 19] = [
    (0x0000_6969, "NFS"),
    (0x0000_517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x6573_5546, "FUSE"),
    (0x0102_1997, "9P"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x00c3_6400, "Ceph"),
    (0x7375_7245, "Coda"),
    (0x0000_564c, "NCP"),
    (0x0116_1970, "GFS2"),
    (0x7461_636f, "OCFS2"),
    (0x0bd0_0bd0, "Lustre"),
    (0x1983_0326, "BeeGFS"),
    (0x4750_4653, "GPFS"),
    (0x786f_4256, "a VirtualBox shared folder"),
    (0xbacb_acbc, "a VMware shared folder"),
    (0x7c7c_6673, "a Parallels shared folder"),
];

const FLEETING: [(u32, &str); 3] = [
    (0x0102_1994, "tmpfs, which is gone with the next boot"),
    (0x8584_58f6, "ramfs, which is gone with the next boot"),
    (0x794c_7630, "overlayfs, which a container takes along when it is removed"),
];

impl FileSystem {
    /// By `f_type` of statfs(2), of which 32 bits count.
    pub(super) fn of_magic(magic: u32) -> Self {
        let named = |table: &[(u32, &'static str)]| table.iter().find(|(of, _)| *of == magic).map(|(_, name)| *name);
        match (named(&REMOTE), named(&FLEETING)) {
            (Some(name), _) => Self::Remote(name),
            (None, Some(name)) => Self::Fleeting(name),
            (None, None) => Self::Local,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_file_systems_are_known_by_their_numbers() {
        for (magic, name) in [
            (0x6969, "NFS"),
            (0xff53_4d42, "CIFS"),
            (0xfe53_4d42, "SMB2"),
            (0x517b, "SMB"),
            (0x6573_5546, "FUSE"),
            (0x0102_1997, "9P"),
            (0x00c3_6400, "Ceph"),
            (0x0bd0_0bd0, "Lustre"),
        ] {
            assert_eq!(FileSystem::of_magic(magic), FileSystem::Remote(name), "{magic:x}");
        }
        // ext4, XFS, Btrfs, ZFS, F2FS.
        for magic in [0xef53, 0x5846_5342, 0x9123_683e, 0x2fc1_2fc1, 0xf2f5_2010] {
            assert_eq!(FileSystem::of_magic(magic), FileSystem::Local, "{magic:x}");
        }
        assert!(matches!(FileSystem::of_magic(0x0102_1994), FileSystem::Fleeting(_)));
    }

    #[test]
    fn no_number_is_listed_twice() {
        let mut all: Vec<_> = REMOTE.iter().chain(&FLEETING).map(|(magic, _)| magic).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), REMOTE.len() + FLEETING.len());
    }
}
