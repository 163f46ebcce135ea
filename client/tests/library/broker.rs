// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A broker in a folder of its own.

use std::io::{PipeWriter, Write, pipe};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use barlink::host::{Attachment, connect_path};
use barlink::{Receiver, Sender};
use barlink_broker::broker::{Broker, Config, Policy};
use barlink_broker::transport::Ivshmem;

/// Time for anything that takes no time.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// A broker that runs until this is dropped.
pub struct Running {
    pub folder: tempfile::TempDir,
    stop: PipeWriter,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Serves one slot and these channels, under the name `default` in the folder.
    pub fn start(channels: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("barlink")).unwrap();
        let config = Config {
            size: 4 << 20,
            vectors: 2 + channels.len() as u32,
            channels: channels
                .iter()
                .map(|channel| channel.parse().unwrap())
                .collect(),
            reserve: Default::default(),
            slots: vec![(Arc::new(Ivshmem), folder.path().join("vm.sock"))],
            control: folder.path().join("barlink/default.sock"),
            policy: Policy::new(Vec::new(), Vec::new()),
        };
        let broker = Broker::new(config, Default::default()).unwrap();
        let (stopped, stop) = pipe().unwrap();
        // The broker gives up the rights of its thread, and of no other.
        let thread = std::thread::spawn(move || {
            broker.run(&stopped.into()).unwrap();
        });
        Running {
            folder,
            stop,
            thread: Some(thread),
        }
    }

    pub fn control(&self) -> PathBuf {
        self.folder.path().join("barlink/default.sock")
    }

    pub fn attach(&self) -> Attachment {
        connect_path(self.control()).unwrap()
    }

    /// Returns both ends of a channel.
    pub fn ends(&self, channel: &str) -> (Sender, Receiver) {
        let app = self.attach();
        (app.sender(channel).unwrap(), app.receiver(channel).unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.write_all(b"x").unwrap();
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(ended.is_some_and(|ended| ended.is_ok()) || std::thread::panicking());
    }
}
