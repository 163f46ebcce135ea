// SPDX-License-Identifier: Apache-2.0 OR MIT

//! An ordinary Debian with the test's agent, its boot, and streams of an ordinary user.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use barlink_sandbox::builds::{Artifacts, repository};
use barlink_sandbox::debian::{Debian, SHOWN};
use barlink_vm::broker::Broker;
use barlink_vm::{COMMAND_TIMEOUT, Vm};

/// Timeout of the system's boot, under TCG on a busy machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(240);

/// The unit of the agent, which runs the test's commands in the booted system.
const AGENT: &str = "[Service]\nExecStart=/usr/local/sbin/barlink-agent\nRestart=on-failure\nRestartSec=1\n\
                     [Install]\nWantedBy=multi-user.target\n";

/// Returns the commands of `docs/install.md` that follow this comment.
pub fn commands(comment: &str) -> Result<String> {
    blocks("sh", comment)
}

/// Returns the blocks of `docs/install.md` in this language that start with this comment.
pub fn blocks(language: &str, comment: &str) -> Result<String> {
    let document = fs::read_to_string(repository().join("docs/install.md"))?;
    let start = format!("```{language}\n");
    let blocks = document.split(&start).skip(1);
    let block = blocks.filter_map(|block| block.split("```").next()?.strip_prefix(comment));
    let commands: String = block.collect();
    ensure!(!commands.is_empty(), "no commands follow {comment}");
    Ok(commands)
}

/// Returns the output of a script, standard error included. An error unless the script succeeded.
pub fn printed(output: Output) -> Result<String> {
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    ensure!(output.status.success(), "{}:\n{text}", output.status);
    Ok(text)
}

/// Writes a disk image of the system, with the agent, a user, and a user of the group `barlink`.
pub fn disk_image(debian: &Debian, disk: &Path) -> Result<()> {
    let script = format!(
        "install {SHOWN}/barlink-agent /usr/local/sbin/
         cp {SHOWN}/agent.service /etc/systemd/system/agent.service
         systemctl enable agent.service
         printf 'u somebody -\\nu member -\\nm member barlink\\n' | systemd-sysusers -
         [ -s /etc/machine-id ] && [ \"$(cat /etc/machine-id)\" != uninitialized ] || systemd-machine-id-setup
         apt-get clean"
    );
    printed(debian.run(&script)?)?;
    printed(debian.write_image(disk, "3G")?).map(drop)
}

/// Makes a Debian that sees `folder`, with the agent's files in it.
pub fn fresh(artifacts: &Artifacts, folder: &Path) -> Result<Debian> {
    fs::copy(
        artifacts.guest("barlink-agent")?,
        folder.join("barlink-agent"),
    )?;
    fs::write(folder.join("agent.service"), AGENT)?;
    Debian::fresh(&artifacts.args.tools, folder, folder)
}

/// Starts the system from its disk, with the broker's device and further options of QEMU.
pub fn boot(
    artifacts: &Artifacts,
    debian: &Debian,
    image: &Path,
    broker: &Broker,
    options: &[(&str, String)],
) -> Result<Vm> {
    boot_with(artifacts, debian, image, broker, options, "")
}

/// Does the same with further words on the kernel's command line, which begin with a space.
pub fn boot_with(
    artifacts: &Artifacts,
    debian: &Debian,
    image: &Path,
    broker: &Broker,
    options: &[(&str, String)],
    words: &str,
) -> Result<Vm> {
    let mut config = broker.vm()?;
    let folder = image.parent().context("the disk has no folder")?;
    config.paths.push(folder.to_owned());
    config.boot_timeout = BOOT_TIMEOUT;
    let drive = format!("file={},format=raw,if=virtio", image.display());
    let kernel = format!("console=ttyS0 tsc=reliable no_timer_check root=/dev/vda rw{words}");
    let own = [("-drive", drive), ("-append", kernel)];
    for (option, value) in own.iter().chain(options) {
        config
            .arguments
            .extend([(*option).to_owned(), value.clone()]);
    }
    let machine = artifacts.with_kernel(debian.release(), debian.kernel_image(), debian.initrd());
    Vm::boot_with(&machine, &config)
}

/// Streams in both directions, as an ordinary user in the guest.
pub fn streams(vm: &Vm, broker: &Broker) -> Result<()> {
    let numbers: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    let sender = "seq 100000 | barlink-guest send";
    let sender = vm.spawn(["runuser", "-u", "member", "--", "sh", "-c", sender])?;
    ensure!(
        broker.run(["recv"])? == numbers.as_bytes(),
        "what came up differs"
    );
    sender.wait(COMMAND_TIMEOUT)?.require_success()?;

    let receiver = vm.spawn(["runuser", "-u", "member", "--", "barlink-guest", "recv"])?;
    let sent = broker.folder().join("down");
    fs::write(&sent, &numbers)?;
    let mut send = broker.app(["send"]);
    let status = send.stdin(fs::File::open(&sent)?).status()?;
    ensure!(status.success(), "`barlink send` failed: {status}");
    let received = receiver.wait(COMMAND_TIMEOUT)?.success()?;
    ensure!(received == numbers, "what came down differs");
    Ok(())
}

/// Repeats an attempt for up to two minutes until it succeeds, because udev acts with a delay,
/// under TCG on a busy machine.
pub fn eventually(mut attempt: impl FnMut() -> Result<String>) -> Result<()> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(_) => return Ok(()),
            Err(error) if start.elapsed() > Duration::from_secs(120) => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(200)),
        }
    }
}
