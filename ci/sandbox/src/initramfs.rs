// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The initramfs that the guest boots: a few files in a cpio archive in the kernel's format.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use cpio::newc::{Builder, ModeFileType, trailer};
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

/// Path and content of the files in every initramfs.
const FILES: [(&str, &[u8]); 2] = [
    ("init", include_bytes!("../../../images/init")),
    ("etc/inittab", include_bytes!("../../../images/inittab")),
];

/// Folders for files and for init's mounts. Device nodes come from the kernel's devtmpfs.
const FOLDERS: [&str; 10] = [
    "bin", "dev", "etc", "lib", "lib/boot", "proc", "root", "run", "sys", "tmp",
];

/// Writes the archive with [`FILES`] and these files. Each has a path in the guest, without the
/// first slash, and a path on the host. Returns the SHA-256 of the archive in hexadecimal digits.
pub fn write(archive: &Path, files: &[(String, &Path)]) -> Result<String> {
    let folder = archive.parent().unwrap_or(Path::new("."));
    // The archive is replaced as a whole, because another VM may be booting from the old one.
    let mut unfinished = NamedTempFile::new_in(folder)?;
    let mut bytes = Vec::new();
    for name in FOLDERS {
        add(&mut bytes, name, ModeFileType::Directory, &[])?;
    }
    for (name, content) in FILES {
        add(&mut bytes, name, ModeFileType::Regular, content)?;
    }
    for (name, path) in files {
        let content =
            fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
        add(&mut bytes, name, ModeFileType::Regular, &content)?;
    }
    trailer(&mut bytes)?;
    unfinished.write_all(&bytes)?;
    unfinished.persist(archive)?;
    let digest = Sha256::digest(&bytes);
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn add(archive: &mut impl Write, name: &str, kind: ModeFileType, content: &[u8]) -> Result<()> {
    let length = u32::try_from(content.len())
        .with_context(|| format!("{name} is too large for the initramfs"))?;
    let entry = Builder::new(name).mode(0o755).set_mode_file_type(kind);
    let mut writer = entry.write(archive, length);
    writer.write_all(content)?;
    writer.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_holds_init_folders_and_files() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "content").unwrap();
        let archive = folder.path().join("archive");
        write(&archive, &[("bin/file".to_owned(), &file)]).unwrap();

        let mut names = Vec::new();
        let mut rest = &fs::read(&archive).unwrap()[..];
        loop {
            let reader = cpio::newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push((reader.entry().name().to_owned(), reader.entry().mode()));
            rest = reader.finish().unwrap();
        }
        assert!(names.contains(&("dev".to_owned(), 0o040_755)), "{names:?}");
        assert!(names.contains(&("init".to_owned(), 0o100_755)), "{names:?}");
        assert!(
            names.contains(&("bin/file".to_owned(), 0o100_755)),
            "{names:?}"
        );
    }
}
