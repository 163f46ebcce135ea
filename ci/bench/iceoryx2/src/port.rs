// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The two ends of a service of iceoryx2. They are set up so that as many bytes can be under way as
//! in barlink's channels, and no sample is lost.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use barlink_bench_load::{CAPACITY, Wait};
use iceoryx2::port::listener::Listener;
use iceoryx2::port::notifier::Notifier;
use iceoryx2::port::publisher::Publisher;
use iceoryx2::port::subscriber::Subscriber;
use iceoryx2::prelude::*;
use iceoryx2::sample::Sample;
use iceoryx2::service::port_factory::event;
use iceoryx2::service::port_factory::publish_subscribe;

/// Time to wait for the other end to come or go, and the time between two checks.
const TIMEOUT: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(1);
/// Largest number of samples under way. For large samples it is smaller: as many as a channel
/// holds.
const MOST_SAMPLES: usize = 1024;

type Stream = publish_subscribe::PortFactory<ipc::Service, [u64], ()>;
type EventService = event::PortFactory<ipc::Service>;

/// Creates the iceoryx2 node of this process.
pub fn node() -> Result<Node<ipc::Service>> {
    // Log messages below errors would slow the ends down, and the bench does not read them.
    set_log_level(LogLevel::Error);
    let builder = NodeBuilder::new().signal_handling_mode(SignalHandlingMode::Disabled);
    builder
        .create()
        .map_err(|error| anyhow!("iceoryx2 gives no node: {error}"))
}

/// The number of receiving ends that a service is for.
#[derive(Clone, Copy, Debug)]
pub enum Readers {
    /// One, for which a sender waits.
    One,
    /// This number, which lose their oldest samples while their queues are full.
    Many(usize),
}

/// Opens or creates a service for samples of `record_size` bytes.
fn stream(
    node: &Node<ipc::Service>,
    service: &str,
    record_size: usize,
    readers: Readers,
) -> Result<Stream> {
    let samples = (CAPACITY as usize / record_size).clamp(2, MOST_SAMPLES);
    let name = ServiceName::new(service).map_err(|error| anyhow!("{service}: {error:?}"))?;
    node.service_builder(&name)
        .publish_subscribe::<[u64]>()
        .enable_safe_overflow(matches!(readers, Readers::Many(_)))
        .history_size(0)
        .max_publishers(1)
        .max_subscribers(readers.count().max(1))
        .subscriber_max_buffer_size(samples)
        .subscriber_max_borrowed_samples(1)
        .open_or_create()
        .map_err(|error| anyhow!("{service} cannot be opened: {error}"))
}

impl Readers {
    fn count(self) -> usize {
        match self {
            Readers::One => 1,
            Readers::Many(count) => count,
        }
    }
}

/// Opens or creates the event for new samples, if the ends sleep.
fn event_service(
    node: &Node<ipc::Service>,
    service: &str,
    wait: Wait,
) -> Result<Option<EventService>> {
    if wait != Wait::Sleep {
        return Ok(None);
    }
    let name = ServiceName::new(&format!("{service}/event"))
        .map_err(|error| anyhow!("{service}: {error:?}"))?;
    node.service_builder(&name)
        .event()
        .open_or_create()
        .map(Some)
        .map_err(|error| anyhow!("{service}'s event cannot be opened: {error}"))
}

/// The sending end of a service.
pub struct SendPort {
    publisher: Publisher<ipc::Service, [u64], ()>,
    notifier: Option<Notifier<ipc::Service>>,
    stream: Stream,
    words: usize,
}

impl SendPort {
    /// Opens the sending end, and waits until the receiving end is there.
    pub fn open(
        node: &Node<ipc::Service>,
        service: &str,
        record_size: usize,
        readers: Readers,
        wait: Wait,
    ) -> Result<Self> {
        let stream = stream(node, service, record_size, readers)?;
        let words = record_size / 8;
        let publisher = stream
            .publisher_builder()
            .initial_max_slice_len(words)
            .max_loaned_samples(1)
            .backpressure_strategy(BackpressureStrategy::RetryUntilDelivered)
            .create()
            .map_err(|error| anyhow!("{service} cannot be published to: {error}"))?;
        let event = event_service(node, service, wait)?;
        let notifier = event
            .map(|event| event.notifier_builder().create())
            .transpose();
        let notifier = notifier.map_err(|error| anyhow!("{service} has no event: {error}"))?;
        let send_port = Self {
            publisher,
            notifier,
            stream,
            words,
        };
        send_port.wait_for(readers.count())?;
        Ok(send_port)
    }

    /// Sends a record. `word` returns the word at an index.
    pub fn send(&mut self, word: impl Fn(usize) -> u64) -> Result<()> {
        let start = Instant::now();
        // A subscriber is counted before it has connected. Until then samples queue up. Once the
        // queue is full, a send reaches no subscriber and must be repeated.
        while self.put(&word)? == 0 {
            ensure!(start.elapsed() < TIMEOUT, "a sample reached no subscriber");
            std::thread::sleep(LOOK);
        }
        if let Some(notifier) = &self.notifier {
            notifier
                .notify()
                .map_err(|error| anyhow!("the event is not notified: {error}"))?;
        }
        Ok(())
    }

    /// Sends a record to all receiving ends, even if there is none.
    pub fn publish(&mut self, word: impl Fn(usize) -> u64) -> Result<()> {
        self.put(word).map(drop)
    }

    /// Sends a record, and returns the number of subscribers that it reached.
    fn put(&mut self, word: impl Fn(usize) -> u64) -> Result<usize> {
        let sample = self
            .publisher
            .loan_slice_uninit(self.words)
            .map_err(|error| anyhow!("no sample is loaned: {error}"))?;
        let sent = sample.write_from_fn(word).send();
        sent.map_err(|error| anyhow!("a sample is not sent: {error}"))
    }

    /// Waits until all receiving ends but this number have left. The samples must exist until then.
    pub fn wait_until_left(&self, but: usize) -> Result<()> {
        self.wait_for(but)
    }

    fn wait_for(&self, subscribers: usize) -> Result<()> {
        let start = Instant::now();
        while self.stream.dynamic_config().number_of_subscribers() != subscribers {
            ensure!(
                start.elapsed() < TIMEOUT,
                "the other end does not come or go"
            );
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

/// The receiving end of a service.
pub struct ReceivePort {
    subscriber: Subscriber<ipc::Service, [u64], ()>,
    listener: Option<Listener<ipc::Service>>,
}

impl ReceivePort {
    /// Opens the receiving end.
    pub fn open(
        node: &Node<ipc::Service>,
        service: &str,
        record_size: usize,
        readers: Readers,
        wait: Wait,
    ) -> Result<Self> {
        let stream = stream(node, service, record_size, readers)?;
        let event = event_service(node, service, wait)?;
        let listener = event
            .map(|event| event.listener_builder().create())
            .transpose();
        let listener = listener.map_err(|error| anyhow!("{service} has no event: {error}"))?;
        // The subscriber comes last, because the other end takes it for the complete end.
        let subscriber = stream
            .subscriber_builder()
            .create()
            .map_err(|error| anyhow!("{service} cannot be subscribed to: {error}"))?;
        Ok(Self {
            subscriber,
            listener,
        })
    }

    /// Looks for a record.
    pub fn look(&mut self) -> Result<Option<Sample<ipc::Service, [u64], ()>>> {
        let sample = self.subscriber.receive();
        sample.map_err(|error| anyhow!("no sample comes: {error}"))
    }

    /// Waits for a record: sleeps for its event, or polls.
    pub fn receive(&mut self) -> Result<Sample<ipc::Service, [u64], ()>> {
        loop {
            if let Some(sample) = self.look()? {
                return Ok(sample);
            }
            match &self.listener {
                None => std::hint::spin_loop(),
                Some(listener) => {
                    listener
                        .blocking_wait(|_| ())
                        .map_err(|error| anyhow!("the event is not notified: {error}"))?;
                }
            }
        }
    }
}
