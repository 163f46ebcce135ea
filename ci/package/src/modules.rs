// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The built driver for the package barlink-modules.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use barlink_sandbox::builds::{driver, target_folder};
use barlink_sandbox::sandbox::Enter;
use barlink_sandbox::tools::{Headers, Tools};

use super::deb::run;

/// A script that gives the module `$1` the form of the own modules of the kernel with the headers
/// `$0`. The signature covers the module without its debug information, and the kernel checks it
/// after it has unpacked the module.
const FINISH: &str = r#"
. "$0/.config"
strip --strip-debug "$1"
[ ! -e /key ] || "$0/scripts/sign-file" "$CONFIG_MODULE_SIG_HASH" /key /certificate "$1"
[ "${CONFIG_MODULE_COMPRESS_ALL-}" != y ] || [ "${CONFIG_MODULE_COMPRESS_XZ-}" != y ] ||
    xz --check=crc32 --lzma2=dict=1MiB "$1"
"#;

/// The kernels that the package barlink-modules is for.
#[derive(Debug)]
pub struct Modules {
    /// Tools with the headers of each kernel.
    pub kernels: Vec<Tools>,
    /// Key and certificate by which the modules are signed.
    pub signer: Option<Signer>,
}

/// A key that signs modules.
#[derive(Clone, Debug)]
pub struct Signer {
    /// Path of the private key, as PEM without a passphrase.
    key: PathBuf,
    /// Path of the key's X.509 certificate, as DER.
    certificate: PathBuf,
}

impl Signer {
    /// Finds the files. An error if one cannot be read, or is not in the form that a signature or
    /// `mokutil` needs.
    pub fn new(key: &Path, certificate: &Path) -> Result<Self> {
        let read = |path: &Path| {
            fs::read(path).with_context(|| format!("--sign: {} cannot be read", path.display()))
        };
        let text = read(key)?;
        let has = |part: &[u8]| text.windows(part.len()).any(|found| found == part);
        ensure!(
            text.starts_with(b"-----BEGIN") && has(b"PRIVATE KEY-----"),
            "--sign: {} is no private key in PEM: convert it with `openssl pkey -inform DER`",
            key.display()
        );
        ensure!(
            !has(b"ENCRYPTED"),
            "--sign: {} has a passphrase: remove it with `openssl pkey`",
            key.display()
        );
        // A DER certificate is a sequence.
        ensure!(
            read(certificate)?.starts_with(b"\x30"),
            "--sign: {} is no certificate in DER: convert it with `openssl x509 -outform DER`",
            certificate.display()
        );
        Ok(Self {
            key: key.canonicalize()?,
            certificate: certificate.canonicalize()?,
        })
    }

    /// Shows a process the key as `/key` and the certificate as `/certificate`, read-only.
    pub fn show(&self, enter: Enter) -> Enter {
        enter
            .show(&self.key, "/key")
            .show(&self.certificate, "/certificate")
    }
}

impl Modules {
    /// Builds the driver for each kernel, and puts it into `folder` as the package has it: a folder
    /// for each kernel with the module and the version of the kernel's package. The certificate of
    /// signed modules lies beside these.
    pub(super) fn build(&self, folder: &Path) -> Result<()> {
        let target = target_folder()?;
        for tools in &self.kernels {
            let release = &tools.release;
            let Headers::Sandboxed(sandbox) = &tools.headers else {
                bail!("only drivers for Debian's kernels are packed: leave --kernel-headers out");
            };
            eprintln!("building the driver for {release} ...");
            let kernel = folder.join(release);
            fs::create_dir(&kernel)?;
            let module = kernel.join("barlink.ko");
            fs::copy(driver(tools, &target)?, &module)?;
            fs::write(
                kernel.join("version"),
                format!("{}\n", sandbox.manifest.package_version),
            )?;
            let mut enter = sandbox.enter().bind(&kernel, &kernel);
            if let Some(signer) = &self.signer {
                enter = signer.show(enter);
            }
            let mut finish = enter.run("sh");
            finish.args(["-ec", FINISH]).arg(sandbox.headers());
            run(finish.arg(&module))
                .with_context(|| format!("the driver for {release} cannot be signed or packed"))?;
        }
        if let Some(signer) = &self.signer {
            fs::copy(&signer.certificate, folder.join("signer.der"))?;
        }
        Ok(())
    }
}
