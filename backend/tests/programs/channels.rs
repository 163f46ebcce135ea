// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of channels that are added while a region is in use.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use barlink::control::client::{Control, ControlError};
use barlink::control::message::{Ask, Entry, Refusal};
use barlink::host::{AttachOptions, Attachment};
use barlink::{Access, Channel, ErrorKind, Kind};
use barlink_protocol::state;
use barlink_protocol::wire::layout::{Layout, Name, PAGE_SIZE, Policy, TABLE_COUNT, table_entry};
use barlink_service::ServiceManager;
use rustix::process::Signal;

use crate::support::*;

/// A reserve for two channels of 64 KiB, with a vector for one of them.
const RESERVE: [&str; 4] = [
    "--size=1M",
    "--reserve=136K,1",
    "--channel=up=up,64K",
    "--channel=loop=host-host,64K",
];

/// Sends records through a channel between two attachments, and receives them.
fn exchange(from: &Attachment, to: &Attachment, name: &str) {
    let (mut sender, mut receiver) = (from.sender(name).unwrap(), to.receiver(name).unwrap());
    for number in 0..1000_u64 {
        sender.send(Kind::USER, &number.to_le_bytes()).unwrap();
        let record = receiver
            .recv_timeout(Duration::from_secs(60))
            .unwrap()
            .unwrap();
        assert_eq!(record.to_vec(), number.to_le_bytes());
    }
}

#[test]
fn added_channel_serves_attached_apps() {
    let broker = Broker::start(&RESERVE);
    let apps = [broker.attach(), broker.attach()];
    let (mut sender, mut receiver) = (
        apps[0].sender("loop").unwrap(),
        apps[1].receiver("loop").unwrap(),
    );
    sender.send(Kind::USER, b"before").unwrap();
    let before = apps[0].layout().clone();
    assert_eq!(
        works(&mut broker.app(&["channel", "list"])),
        "up: slot 0 to host, 64.00 KiB, vector 1\n\
         loop: host to host, 64.00 KiB, vector 2\n\
         room is left for 17 more at most, of 136.00 KiB in all\n"
    );
    assert_eq!(
        works(&mut broker.app(&["channel", "add", "new=host-host,64K,drop"])),
        "channel `new` is added; room is left for 8 more at most, of 68.00 KiB in all\n"
    );
    // The apps find the channel, and their ends go on.
    exchange(&apps[0], &apps[1], "new");
    assert_eq!(receiver.recv().unwrap().to_vec(), b"before");
    sender.send(Kind::USER, b"after").unwrap();
    assert_eq!(receiver.recv().unwrap().to_vec(), b"after");
    let layout = apps[0].layout();
    assert!(layout.extends(&before));
    let added = &layout.channels()[2];
    assert_eq!((added.vector, added.policy), (3, Policy::Drop));
    // The commands show the new channel as they show the others.
    let list: serde_json::Value =
        serde_json::from_str(&works(&mut broker.app(&["channel", "list", "--json"]))).unwrap();
    assert_eq!(list["channels"][2]["name"], "new");
    assert_eq!(
        (&list["entries"], &list["room"]),
        (&57.into(), &(68 << 10).into())
    );
    let shown = works(&mut broker.app(&["inspect", "--once"]));
    assert!(shown.contains("new "), "{shown}");
    drop((sender, receiver));
    assert_eq!(apps[1].reset("new").unwrap(), 1);
    exchange(&apps[1], &apps[0], "new");
}

#[test]
fn broker_refuses_invalid_channels() {
    let broker = Broker::start(&RESERVE);
    let add = |channel: &str, code, parts: &[&str]| {
        fails(&mut broker.app(&["channel", "add", channel]), code, parts);
    };
    let room = "136 KiB are left";
    add("big=up,256K", 1, &["260 KiB", room, "--reserve"]);
    add("up=up,64K", 1, &["`up` already"]);
    add("other=up,60K", 2, &["power of two"]);
    add("other=1-host,64K", 1, &["slot 1"]);
    works(&mut broker.app(&["channel", "add", "a=up,64K"]));
    works(&mut broker.app(&["channel", "add", "b=host-0,64K"]));
    add("c=up,4K", 1, &["8 KiB", "no room", "larger --reserve"]);
    // No program checks these requests before the broker.
    let control = Control::connect(&broker.control()).unwrap();
    let ask = |capacity, producer| {
        let name = Name::new("odd").unwrap();
        let channel = broker.attach().layout().channels()[0];
        let wanted = Channel {
            name,
            capacity,
            producer,
            ..channel
        };
        control.ask(Ask::AddChannel(Entry(wanted))).unwrap_err()
    };
    for (capacity, producer) in [(u64::MAX, 0), (1 << 63, 0), (PAGE_SIZE, 0)] {
        let refused = ask(capacity, producer);
        assert!(
            matches!(refused, ControlError::Refused(Refusal::NoRoom { .. })),
            "{refused}"
        );
    }
    let other = Broker::start(&["--size=1M", "--reserve=64K"]);
    let control = Control::connect(&other.control()).unwrap();
    let channel = other.attach().layout().channels()[0];
    let name = Name::new("odd").unwrap();
    for (capacity, producer) in [
        (0, 0),
        (8, 0),
        (12 << 10, 0),
        (PAGE_SIZE, 2),
        (PAGE_SIZE, u32::MAX),
    ] {
        let wanted = Channel {
            name,
            capacity,
            producer,
            ..channel
        };
        let refused = control.ask(Ask::AddChannel(Entry(wanted))).unwrap_err();
        assert!(
            matches!(refused, ControlError::Refused(Refusal::InvalidChannel(_))),
            "{refused}"
        );
    }
    assert_eq!(other.attach().layout().channels().len(), 2);
    // A reader changes nothing, and a region without a reserve has no room.
    let reader = AttachOptions::new()
        .access(Access::ReadOnly)
        .connect_path(other.control())
        .unwrap();
    let refused = reader.add_channel(Channel { name, ..channel }).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    assert!(refused.to_string().contains("read-only"), "{refused}");
    let plain = Broker::start(&["--size=1M"]);
    fails(
        &mut plain.app(&["channel", "add", "a=up,4K"]),
        1,
        &["no room for new channels is left"],
    );
    let list = works(&mut plain.app(&["channel", "list"]));
    assert!(
        list.ends_with(
            "no room is reserved for more channels (`serve --reserve SIZE` reserves some)\n"
        ),
        "{list}"
    );
}

#[test]
fn added_channels_survive_replaced_and_killed_brokers() {
    let mut broker = Broker::start(&RESERVE);
    let app = broker.attach();
    works(&mut broker.app(&["channel", "add", "a=host-host,64K"]));
    let mut sender = app.sender("a").unwrap();
    sender.send(Kind::USER, b"kept").unwrap();
    let layout = app.layout().clone();
    succeed(&mut broker, &RESERVE);
    assert_eq!(broker.attach().layout(), &layout);
    works(&mut broker.app(&["channel", "add", "b=host-host,64K"]));
    let mut receiver = broker.attach().receiver("a").unwrap();
    assert_eq!(receiver.recv().unwrap().to_vec(), b"kept");
    exchange(&broker.attach(), &app, "b");
    // A broker with another reserve cannot take over the region.
    let mut other = broker.command(&["--size=1M", "--reserve=72K,1", "--replace"]);
    fails(&mut other, 1, &["another size or other channels"]);

    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut service = Broker::start_as(&manager, folder, &RESERVE);
    works(&mut service.app(&["channel", "add", "a=host-host,64K"]));
    let layout = service.attach().layout().clone();
    service.start_again(&manager, &RESERVE);
    assert_eq!(service.attach().layout(), &layout);
    service.restart(&manager, &RESERVE);
    assert_eq!(service.attach().layout(), &layout);
    exchange(&service.attach(), &service.attach(), "a");
}

/// A guest's kernel or a host app can write any word of the region. All other programs go on, and a
/// successor stores the broker's own table again.
#[test]
fn forged_table_misleads_no_host_app() {
    let mut broker = Broker::start(&RESERVE);
    let app = broker.attach();
    let region = app.region();
    let layout = app.layout().clone();
    let (offset, size) = (layout.reserve_offset, layout.region_size);
    // The attacker fills the reserve with bytes that make a new channel there corrupt.
    region.copy_in(offset, &[0xff; 4096]).unwrap();
    for word in (table_entry(0)..table_entry(4)).step_by(8) {
        region.store(word, u64::MAX).unwrap();
    }
    for count in [0, 4, 60, u64::MAX] {
        region.store(TABLE_COUNT, count).unwrap();
        assert_eq!(broker.attach().layout(), &layout);
        assert_eq!(app.refresh().unwrap(), &layout);
        exchange(&app, &broker.attach(), "loop");
    }
    works(&mut broker.app(&["channel", "add", "a=host-host,64K"]));
    exchange(&app, &broker.attach(), "a");
    // The new entry and the count are the broker's. A successor stores the whole table again.
    succeed(&mut broker, &RESERVE);
    let published = state::read_layout(region.ring(), size);
    assert_eq!(published.as_ref(), Ok(app.layout()));
    assert_eq!(published, Layout::decode(&app.layout().encode(), size));
    let (_, code) = broker.stop(Signal::TERM);
    assert_eq!(code, Some(0));
}

/// Kills a broker after each store of a new channel: those in the broker's own table, and then
/// those in the region's. A successor has the channel once its own table has it whole, and the
/// region's table then follows. Words that only the region has are forged by another program.
#[test]
fn successor_completes_table_of_killed_broker() {
    const NEW: &str = "new=host-host,64K";
    let folder = tempfile::tempdir().unwrap();
    let manager = ServiceManager::new(folder.path()).unwrap();
    let mut service = Broker::start_as(&manager, folder, &RESERVE);
    // Its mapping outlives the brokers.
    let app = service.attach();
    let own = File::from(manager.descriptor("ledger").unwrap());
    let before = app.layout().clone();
    works(&mut service.app(&["channel", "add", NEW]));
    let after = service.attach().layout().clone();
    let pages = [before.encode(), after.encode()];
    let changed = (0..pages[0].len()).filter(|&word| pages[0][word] != pages[1][word]);
    let (count, entry): (Vec<_>, Vec<_>) =
        changed.partition(|&word| word as u64 == TABLE_COUNT / 8);
    let stores = [entry, count].concat();
    let all = stores.len();
    assert!(all > 4, "{stores:?}");
    let killed = (0..all).map(|own| (own, 0));
    let killed = killed.chain((0..=all).map(|region| (all, region)));
    let forged = (1..=all).map(|region| (0, region));
    for (own_stores, region_stores) in killed.chain(forged) {
        // The claims of the round before have ended.
        service.wait_until_idle();
        kill(&mut service.child);
        for (number, &word) in stores.iter().enumerate() {
            let offset = 8 * word as u64;
            let value = |stores| pages[usize::from(number < stores)][word];
            let bytes = value(own_stores).to_le_bytes();
            own.write_all_at(&bytes, offset).unwrap();
            app.region().store(offset, value(region_stores)).unwrap();
        }
        service.start_service_again(&manager, &RESERVE);
        let is_whole = own_stores == all;
        let expected = if is_whole { &after } else { &before };
        let published = || state::read_layout(app.region().ring(), before.region_size);
        let state = format!("{own_stores} own stores, {region_stores} in the region");
        assert_eq!(service.attach().layout(), expected, "{state}");
        assert_eq!(published().as_ref(), Ok(expected), "{state}");
        let mut add = service.app(&["channel", "add", NEW]);
        match is_whole {
            true => fails(&mut add, 1, &["`new` already"]),
            false => drop(works(&mut add)),
        }
        assert_eq!(published().as_ref(), Ok(&after), "{state}");
        exchange(&service.attach(), &service.attach(), "new");
    }
}
