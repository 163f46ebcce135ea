// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the package barlink-modules that need no installed Debian: the choice of a kernel's
//! driver, the signature, and the driver for a kernel without large pages.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use barlink_package::{self as package, Modules, Signer};
use barlink_sandbox::builds::repository;
use barlink_sandbox::sandbox::{Enter, Sandbox};
use barlink_sandbox::tools::{Tools, VmArgs};
use tempfile::TempDir;
use walkdir::WalkDir;

/// Path of the script that chooses drivers, in the tests of the choice.
const SELECT: &str = "/barlink/select-module";

/// Releases of the tests' kernels, and the versions of their packages: the first one fits its
/// driver, the second one is newer, the third one is not Debian's, and the last one has no driver.
const KERNELS: [(&str, Option<&str>); 4] = [
    ("7.3.4+deb13-amd64", Some("7.3.4-1")),
    ("7.3.4+deb13-cloud-amd64", Some("7.3.4-2")),
    ("7.2.12-own", None),
    ("6.12.1+deb13-amd64", Some("6.12.1-1")),
];

fn tools() -> Result<Tools> {
    Tools::find(&VmArgs::from_environment()?.tools)
}

fn sandbox() -> Result<Sandbox> {
    let sandbox = tools()?.sandbox;
    sandbox.context("these tests need the sandbox: run them without tools of your own")
}

/// Runs a shell script, and returns its output with standard error.
fn output(enter: Enter, script: &str) -> Result<String> {
    let script = format!("exec 2>&1; {script}");
    let output = enter.run("sh").args(["-ec", &script]).output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "{}: {text}", output.status);
    Ok(text)
}

/// A system with kernels and with drivers for all but the last one.
struct System {
    sandbox: Sandbox,
    folder: TempDir,
}

impl System {
    fn new() -> Result<Self> {
        let sandbox = sandbox()?;
        let folder = tempfile::tempdir()?;
        let at = |path: &str| folder.path().join(path);
        // depmod reads the module, so that it must be one.
        let mut modules = WalkDir::new(sandbox.root().join("usr/lib/modules")).into_iter();
        let is_module = |path: &Path| path.extension().is_some_and(|end| end == "xz");
        let module =
            modules.find_map(|entry| Some(entry.ok()?.into_path()).filter(|path| is_module(path)));
        let module = module.context("the sandbox's kernel has no module")?;
        fs::create_dir_all(at("dpkg"))?;
        let mut status = String::new();
        for (index, (release, version)) in KERNELS.into_iter().enumerate() {
            let kernel = at("modules").join(release);
            fs::create_dir_all(&kernel)?;
            for name in [
                "modules.dep",
                "modules.order",
                "modules.builtin",
                "modules.builtin.modinfo",
            ] {
                fs::write(kernel.join(name), "")?;
            }
            if index < KERNELS.len() - 1 {
                let driver = at("barlink/modules").join(release);
                fs::create_dir_all(&driver)?;
                fs::copy(&module, driver.join("barlink.ko.xz"))?;
                fs::write(driver.join("version"), "7.3.4-1\n")?;
            }
            if let Some(version) = version {
                status += &format!(
                    "Package: linux-modules-{release}\nStatus: install ok installed\n\
                     Architecture: amd64\nMaintainer: x\nVersion: {version}\nDescription: x\n\n"
                );
            }
        }
        fs::write(at("dpkg/status"), status)?;
        fs::copy(
            repository().join("images/packaging/select-module"),
            at("barlink/select-module"),
        )?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(at("barlink/select-module"), mode)?;
        Ok(Self { sandbox, folder })
    }

    /// Returns the path of a kernel's folder for drivers that are not its own.
    fn updates(&self, release: &str) -> PathBuf {
        self.folder
            .path()
            .join("modules")
            .join(release)
            .join("updates")
    }

    fn run(&self, script: &str) -> Result<String> {
        let at = |name: &str| self.folder.path().join(name);
        let enter = self.sandbox.enter().bind(&at("dpkg"), "/dpkg");
        let enter = enter
            .bind(&at("barlink"), "/barlink")
            .bind(&at("modules"), "/usr/lib/modules");
        output(enter, &format!("export DPKG_ADMINDIR=/dpkg; {script}"))
    }
}

#[test]
fn each_kernel_gets_its_driver_or_reason() -> Result<()> {
    let system = System::new()?;
    let [fits, newer, own, without] = KERNELS.map(|(release, _)| release);
    let output = system.run(SELECT)?;
    // A second call changes nothing.
    ensure!(system.run(SELECT)? == output);
    for line in [
        format!("kernel {fits} has its driver"),
        format!(
            "kernel {newer} has no driver: this package was built for version 7.3.4-1 of \
             linux-modules-{newer}, and found 7.3.4-2: install the same version, or barlink-dkms instead"
        ),
        format!("linux-modules-{own}, and found none: install the same version"),
        format!(
            "kernel {without} has no driver: none was built for it: boot one of these, or install \
             barlink-dkms instead: {own} {fits} {newer}"
        ),
    ] {
        ensure!(output.contains(&line), "no `{line}` in {output}");
    }
    ensure!(output.lines().count() == KERNELS.len(), "{output}");
    let dependencies = system.updates(fits).with_file_name("modules.dep");
    ensure!(fs::read_to_string(&dependencies)?.contains("updates/barlink.ko.xz"));
    for release in [newer, own, without] {
        ensure!(!system.updates(release).exists(), "{release}");
    }

    // An upgrade without a driver for the kernel takes the old one away.
    fs::remove_dir_all(system.folder.path().join("barlink/modules").join(fits))?;
    let output = system.run(&format!("{SELECT} {fits}"))?;
    ensure!(output.contains("none was built for it"), "{output}");
    ensure!(!system.updates(fits).exists());
    ensure!(!fs::read_to_string(&dependencies)?.contains("barlink"));
    Ok(())
}

#[test]
fn foreign_files_and_links_are_kept() -> Result<()> {
    let system = System::new()?;
    let release = KERNELS[0].0;
    let updates = system.updates(release);
    let others = [
        updates.join("barlink.ko"),
        updates.join("dkms/barlink.ko.xz"),
    ];
    for other in others {
        fs::create_dir_all(other.parent().unwrap_or(&updates))?;
        symlink("/barlink/elsewhere", &other)?;
        for option in ["", "--remove"] {
            let output = system.run(&format!("{SELECT} {option} {release}"))?;
            ensure!(other.is_symlink(), "{output}");
            ensure!(
                option == "--remove" || output.contains("is not this package's: remove it"),
                "{output}"
            );
        }
        fs::remove_file(other)?;
    }
    // A link in place of a folder is not followed.
    fs::remove_dir_all(&updates)?;
    let elsewhere = system.folder.path().join("modules/elsewhere");
    fs::create_dir(&elsewhere)?;
    symlink("../elsewhere", &updates)?;
    let output = system.run(&format!("{SELECT} {release}"))?;
    ensure!(
        output.contains("/updates is no folder: remove it"),
        "{output}"
    );
    ensure!(fs::read_dir(&elsewhere)?.next().is_none(), "{output}");
    // A folder that is no kernel's is left alone.
    let empty = system.folder.path().join("modules/empty");
    fs::create_dir(&empty)?;
    let output = system.run(&format!("{SELECT} --remove"))?;
    ensure!(empty.is_dir() && !output.contains("empty"), "{output}");
    Ok(())
}

#[test]
fn drivers_are_selected_by_relative_path() -> Result<()> {
    let system = System::new()?;
    let release = KERNELS[0].0;
    for command in [SELECT, "cd /barlink; ./select-module", SELECT] {
        let output = system.run(&format!("{command} {release}"))?;
        ensure!(output.contains("has its driver"), "{command}: {output}");
    }
    let link = fs::read_link(system.updates(release).join("barlink.ko.xz"))?;
    ensure!(link.is_absolute(), "{}", link.display());
    Ok(())
}

#[test]
fn kernel_hooks_add_and_remove_drivers() -> Result<()> {
    let system = System::new()?;
    let release = KERNELS[0].0;
    let updates = system.updates(release);
    let hook = |event: &str, action: &str| -> Result<String> {
        let text =
            fs::read_to_string(repository().join(format!("images/packaging/kernel.{event}")))?;
        let text = text.replace("/usr/lib/barlink/select-module", SELECT);
        fs::write(system.folder.path().join("barlink/hook"), text)?;
        system.run(&format!(
            "DEB_MAINT_PARAMS='{action}' sh -e /barlink/hook {release} /boot/vmlinuz"
        ))
    };
    let output = hook("postinst", "configure 7.3.3")?;
    ensure!(
        output.lines().count() == 1 && output.contains("has its driver"),
        "{output}"
    );
    hook("postrm", "upgrade 7.3.5")?;
    ensure!(updates.join("barlink.ko.xz").is_symlink());
    let output = hook("postrm", "remove")?;
    ensure!(output.contains("removed the driver from"), "{output}");
    ensure!(!updates.exists());
    ensure!(hook("postrm", "purge")?.is_empty());

    // A removed kernel leaves no folder behind, and no hook ends the work of dpkg.
    hook("postinst", "configure")?;
    for entry in fs::read_dir(updates.with_file_name(""))? {
        let path = entry?.path();
        if path.is_file() {
            fs::remove_file(path)?;
        }
    }
    hook("postrm", "remove")?;
    ensure!(!updates.with_file_name("").exists());
    fs::remove_file(system.folder.path().join("barlink/select-module"))?;
    hook("postinst", "configure")?;
    Ok(())
}

/// Makes a key and its certificate in a folder, and returns their paths.
fn make_key(folder: &Path) -> Result<[PathBuf; 2]> {
    let [key, certificate] = ["key.pem", "key.der"].map(|name| folder.join(name));
    let mut openssl = Command::new("openssl");
    openssl.args("req -new -x509 -newkey rsa:2048 -nodes -outform DER".split(' '));
    openssl.args(["-subj", "/CN=a test", "-out"]);
    openssl.arg(&certificate).arg("-keyout").arg(&key);
    let made = openssl.output();
    let made = made.context("openssl cannot be started: install it")?;
    ensure!(made.status.success(), "{made:?}");
    Ok([key, certificate])
}

/// Splits a module into its content and its signature, a PKCS#7 message. The signature is behind
/// the content, and before its own description (`struct module_signature` of the kernel).
fn split(module: &[u8]) -> Result<(&[u8], &[u8])> {
    let signed = module.strip_suffix(b"~Module signature appended~\n");
    let (rest, description) = signed
        .and_then(<[u8]>::split_last_chunk::<12>)
        .context("there is no signature")?;
    let length = u32::from_be_bytes(*description.last_chunk().context("no length")?);
    let start = rest.len().checked_sub(length as usize);
    Ok(rest.split_at(start.context("a long signature")?))
}

/// Checks a module's signature by a certificate, as the kernel does. Returns whether it fits.
fn is_signed_by(certificate: &Path, module: &[u8], folder: &Path) -> Result<bool> {
    let (content, signature) = split(module)?;
    let at = |name: &str| folder.join(name);
    fs::write(at("content"), content)?;
    fs::write(at("signature"), signature)?;
    let mut openssl = Command::new("openssl");
    // The certificate needs no other one that signs it.
    openssl.args("cms -verify -binary -inform DER -nointern -noverify -out /dev/null".split(' '));
    openssl.arg("-certfile").arg(certificate);
    openssl.arg("-in").arg(at("signature"));
    openssl.arg("-content").arg(at("content"));
    Ok(openssl.output()?.status.success())
}

#[test]
fn signed_driver_names_its_signer() -> Result<()> {
    let tools = tools()?;
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let [key, certificate] = make_key(folder.path())?;
    let signer = Signer::new(&key, &certificate)?;
    let modules = Modules {
        kernels: vec![tools.clone()],
        signer: Some(signer.clone()),
    };
    let packages = package::build(&at("packages"), Some(&modules))?;
    let root = at("root");
    let unpacked = Command::new("dpkg-deb")
        .arg("-x")
        .arg(&packages["barlink-modules"])
        .arg(&root)
        .status()?;
    ensure!(unpacked.success());

    let drivers = root.join("usr/lib/barlink/modules");
    ensure!(fs::read(drivers.join("signer.der"))? == fs::read(at("key.der"))?);
    let driver = drivers.join(&tools.release).join("barlink.ko.xz");
    let enter = sandbox()?.enter().bind(&driver, "/barlink.ko.xz");
    let shown = output(enter, "modinfo /barlink.ko.xz")?;
    for (name, value) in [
        ("signer", "a test"),
        ("sig_hashalgo", "sha256"),
        ("vermagic", &tools.release),
    ] {
        let line = shown
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        ensure!(
            line.is_some_and(|line| line.trim_start().starts_with(value)),
            "{name}: {shown}"
        );
    }
    let module = Command::new("xz").arg("-dc").arg(&driver).output()?.stdout;
    ensure!(
        is_signed_by(&certificate, &module, folder.path())?,
        "{shown}"
    );
    let mut changed = module.clone();
    changed[module.len() / 2] ^= 1;
    ensure!(!is_signed_by(&certificate, &changed, folder.path())?);
    let elsewhere = tempfile::tempdir()?;
    let [_, other] = make_key(elsewhere.path())?;
    ensure!(!is_signed_by(&other, &module, folder.path())?);

    // No process of a build can change the key.
    let before = fs::read(&key)?;
    let write = "for file in /key /certificate; do ! echo x 2>/dev/null >>$file; done";
    output(signer.show(sandbox()?.enter()), write)?;
    ensure!(fs::read(&key)? == before);
    // The arguments in the other order are an error in one line.
    let swapped = Signer::new(&at("key.der"), &at("key.pem"));
    let error = swapped
        .err()
        .context("a certificate is no key")?
        .to_string();
    ensure!(error.contains("is no private key in PEM"), "{error}");
    Ok(())
}

/// Builds the driver as for a kernel without `CONFIG_TRANSPARENT_HUGEPAGE`: the compilers see no
/// such option, and the kernel exports no function of it. The rest of the headers stays as it is.
#[test]
fn driver_builds_without_transparent_hugepages() -> Result<()> {
    let sandbox = sandbox()?;
    let headers = sandbox.headers();
    let folder = tempfile::tempdir()?;
    let output_folder = folder.path().join("output");
    fs::create_dir(&output_folder)?;
    let source = repository().join("guest-driver");
    let mut enter = sandbox.enter().bind(&output_folder, &output_folder);
    for path in [&source, &repository().join("protocol/src/wire")] {
        enter = enter.bind_read_only(path);
    }
    let large = [
        "CONFIG_TRANSPARENT_HUGEPAGE",
        "vmf_insert_pfn_",
        "thp_get_unmapped_area",
    ];
    for name in [
        "include/generated/rustc_cfg",
        "include/generated/autoconf.h",
        "Module.symvers",
    ] {
        let inside = headers.join(name);
        let path = sandbox.root().join(inside.strip_prefix("/")?);
        let text = fs::read_to_string(&path)?;
        let without = text
            .lines()
            .filter(|line| !large.iter().any(|word| line.contains(word)));
        let without: String = without.flat_map(|line| [line, "\n"]).collect();
        ensure!(
            without != text,
            "{} says nothing about large pages",
            path.display()
        );
        let changed = folder.path().join(name.replace('/', "-"));
        fs::write(&changed, without)?;
        enter = enter.bind(&changed, inside);
    }
    let make = format!(
        "make --no-print-directory -C {} M={} MO={} KRUSTFLAGS=-Dwarnings KCFLAGS=-Werror modules",
        headers.display(),
        source.display(),
        output_folder.display()
    );
    let log = output(enter, &make)?;
    ensure!(!log.to_lowercase().contains("warning:"), "{log}");
    ensure!(output_folder.join("barlink.ko").is_file(), "{log}");
    Ok(())
}
