// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A broker that host apps, VMs and writers of the region attack. Each request has its documented
//! effect and no other, in the broker's own state as in the region.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use barlink::Access;
use barlink::control::message::{
    Added, Answer, Ask, Entry, MAX_COPY, MAX_PACKET, Refusal, RegionInfo, Request,
};
use barlink_broker::broker::{Broker, BrokerState, Next};
use barlink_broker::persistence::{Inheritance, name};
use barlink_broker::slot::{DmaBuffer, GuestMemorySize, Session};
use barlink_protocol::PresenceWords;
use barlink_protocol::wire::layout::{
    Channel, ENTRY_WORDS, End, Layout, MAX_CHANNELS, NO_PEER, TABLE_COUNT, channel, encode_entry,
    table_entry,
};
use rustix::fs::OFlags;

use crate::app::App;
use crate::broker::{PEER, of_two_slots, vmm};
use crate::snapshot::{Snapshot, header, holder_word};

/// A broker, its host apps and its VMs.
pub struct Attacked {
    is_crowded: bool,
    /// `None` only while a successor is made.
    broker: Option<Broker>,
    state: Arc<BrokerState>,
    apps: BTreeMap<u8, App>,
    vms: [Option<Session>; 2],
    buffer: Box<[u8; MAX_PACKET]>,
}

impl Attacked {
    /// Creates a broker without host apps and VMs. The channel table of a crowded region is nearly
    /// full.
    pub fn new(is_crowded: bool) -> Self {
        let broker = of_two_slots(is_crowded, Inheritance::new());
        Attacked {
            is_crowded,
            state: Arc::clone(broker.state()),
            broker: Some(broker),
            apps: BTreeMap::new(),
            vms: [None, None],
            buffer: Box::new([0; MAX_PACKET]),
        }
    }

    /// Writes bytes into the region, as any program on either side can.
    pub fn scribble(&self, offset: u64, bytes: &[u8]) {
        let left = self.state.region.size().saturating_sub(offset);
        let bytes = &bytes[..bytes.len().min(left as usize)];
        let memory = self.state.region.memory(Access::ReadWrite);
        rustix::io::pwrite(memory, bytes, offset).expect("memory can be written");
    }

    /// Returns the offset of the page of a slot's driver.
    pub fn driver_page(&self, slot: u32) -> u64 {
        self.state.region.layout().presence_page(slot)
    }

    /// Returns the number of bytes in the region.
    pub fn size(&self) -> u64 {
        self.state.region.size()
    }

    /// Makes something happen to the VMs: one comes to a slot or leaves it, gets a descriptor, is
    /// reset, or announces its memory; or its thread answers the host apps that read its memory.
    pub fn vm(&mut self, event: u8) {
        let slot = Arc::clone(&self.state.slots[0]);
        match event {
            b'0' | b'1' => {
                let id = usize::from(event - b'0');
                self.vms[id] = match self.vms[id].take() {
                    Some(_) => None,
                    None => self.state.slots[id].occupy(PEER, vmm()).ok(),
                };
            }
            b'd' => slot.mark_descriptor(),
            b'r' => slot.restart(),
            b'm' => slot.set_guest_memory(GuestMemorySize {
                readable: 1 << 30,
                unreadable: 4096,
            }),
            b'b' => slot.set_buffer(Some(DmaBuffer {
                address: 1 << 20,
                size: 4096,
            })),
            b'a' => {
                while let Some(request) = slot.requests().take() {
                    assert!(request.length <= MAX_COPY);
                    let bytes = vec![0; request.length];
                    request.answer(Ok(bytes));
                    self.receive_bytes();
                }
            }
            _ => (),
        }
        self.receive_bytes();
    }

    /// Receives the answers of VMs.
    fn receive_bytes(&mut self) {
        for app in self.apps.values() {
            for (answer, descriptors) in app.answers(&mut self.buffer) {
                let is_one = matches!(answer, Answer::Bytes(_) | Answer::Refused(Refusal::NoVm(_)));
                assert!(is_one && descriptors.is_empty(), "{answer:?}");
            }
        }
    }

    /// Sends a packet of the host app of a digit. If it asks for a hand-over, the packets that
    /// follow are sent at once, because the broker waits for them, and then the app leaves.
    pub fn packet<'a>(
        &mut self,
        digit: u8,
        packet: &[u8],
        following: impl Iterator<Item = &'a [u8]>,
    ) {
        let packet = &packet[..packet.len().min(MAX_PACKET)];
        let ask = Request::parse(packet);
        self.apps
            .entry(digit)
            .or_insert_with(|| App::connect(digit));
        if ask == Ok(Ask::HandOver) {
            return self.hand_over(digit, packet, following);
        }
        let before = Snapshot::take(&self.state);
        let app = self.apps.get_mut(&digit).expect("it has connected");
        app.send(packet);
        let next = app.handle(&self.state, &mut self.buffer);
        if packet.is_empty() {
            assert!(matches!(next, Next::Leaves(None)), "{next:?}");
            return self.leave(digit);
        }
        assert!(matches!(next, Next::Stays), "{next:?}");
        let app = &self.apps[&digit];
        let mut answers = app.answers(&mut self.buffer).into_iter();
        let answer = answers.next();
        assert!(answers.next().is_none(), "an answer more");
        let after = Snapshot::take(&self.state);
        let check = Check {
            state: &self.state,
            app,
            before: &before,
            after: &after,
        };
        match (ask, answer) {
            (Ok(ask), Some((Answer::Refused(refusal), descriptors))) => {
                assert!(descriptors.is_empty());
                after.check_same(&before);
                check.refusal(&ask, &refusal);
            }
            (Ok(ask), Some((answer, descriptors))) => check.answer(&ask, &answer, &descriptors),
            (Ok(ask), None) => {
                after.check_same(&before);
                check.waits_for_vm(&ask);
            }
            (Err(_), Some((Answer::Refused(refusal), _))) => {
                after.check_same(&before);
                let is_one = matches!(refusal, Refusal::Malformed(_) | Refusal::Version { .. });
                assert!(is_one, "{refusal}");
            }
            (Err(_), answer) => panic!("{answer:?}"),
        }
        if let Ok(Ask::Attach { access }) = Request::parse(packet)
            && let Some(app) = self.apps.get_mut(&digit)
            && (app.most == Access::ReadWrite || access == Access::ReadOnly)
        {
            app.access = access;
        }
    }

    /// Does what the broker's loop does when a client leaves.
    fn leave(&mut self, digit: u8) {
        let Some(app) = self.apps.remove(&digit) else {
            return;
        };
        let held = self.state.roster.claims().len();
        let given_back = self.state.roster.release_all(app.id).len();
        assert_eq!(self.state.roster.claims().len(), held - given_back);
        assert!(!self.state.roster.holds(app.id) && !self.state.roster.is_reader(app.id));
        self.state.descriptors.remove(&name::client(app.id));
    }

    /// Hands over to a host app, if it asks in the right way.
    fn hand_over<'a>(
        &mut self,
        digit: u8,
        packet: &[u8],
        following: impl Iterator<Item = &'a [u8]>,
    ) {
        // The VM's session would go on under the successor.
        self.vms[0] = None;
        self.receive_bytes();
        let before = Snapshot::take(&self.state);
        let following: Vec<_> = following.take(3).collect();
        let retires = following.first().map(|packet| Request::parse(packet));
        let stays = self.vms[1].is_some();
        let app = self.apps.get_mut(&digit).expect("it has connected");
        let succeeds = app.is_owner && !stays && retires == Some(Ok(Ask::Retire));
        for packet in std::iter::once(packet).chain(following) {
            app.send(packet);
        }
        app.stop_sending();
        let next = app.handle(&self.state, &mut self.buffer);
        let answers = app.answers(&mut self.buffer);
        assert_eq!(matches!(next, Next::TakesOver), succeeds, "{next:?}");
        if !succeeds {
            let first = answers.into_iter().next().map(|(answer, _)| answer);
            match first {
                Some(Answer::Refused(Refusal::NotOwner)) => assert!(!app.is_owner),
                Some(Answer::Refused(Refusal::Stays { slot, .. })) => assert!(stays && slot == 1),
                Some(Answer::Inheritance { .. }) => assert!(app.is_owner && !stays),
                other => panic!("{other:?}"),
            }
            Snapshot::take(&self.state).check_same(&before);
            return self.leave(digit);
        }
        // The predecessor's process ends: its state stays locked.
        self.apps.remove(&digit);
        self.broker = None;
        let mut inheritance = Inheritance::new();
        for (answer, descriptors) in answers {
            match answer {
                Answer::Inheritance { names, .. } => {
                    assert_eq!(names.len(), descriptors.len());
                    inheritance.extend(names.into_iter().zip(descriptors));
                }
                Answer::Done => assert!(descriptors.is_empty()),
                other => panic!("{other:?}"),
            }
        }
        let broker = of_two_slots(self.is_crowded, inheritance);
        self.state = Arc::clone(broker.state());
        self.broker = Some(broker);
        let after = Snapshot::take(&self.state);
        assert_eq!(after.layout, before.layout);
        assert_eq!(after.claims, before.claims);
        let roster = &self.state.roster;
        for app in self.apps.values() {
            assert_eq!(roster.is_reader(app.id), app.access == Access::ReadOnly);
        }
    }
}

/// A request, its host app, and the state around it.
struct Check<'a> {
    state: &'a BrokerState,
    app: &'a App,
    before: &'a Snapshot,
    after: &'a Snapshot,
}

impl Check<'_> {
    /// Checks the effect of a request that was carried out.
    fn answer(&self, ask: &Ask, answer: &Answer, descriptors: &[OwnedFd]) {
        let (before, after) = (self.before, self.after);
        let adds = matches!(ask, Ask::AddChannel(_));
        assert!(adds || after.layout == before.layout);
        let changes_claims = matches!(ask, Ask::Claim { .. } | Ask::Release { .. });
        assert!(changes_claims || after.claims == before.claims);
        let changes = adds | matches!(ask, Ask::Claim { .. } | Ask::Reset { .. });
        assert!(!changes || self.may_write(), "{ask:?}");
        let expected = match (ask, answer) {
            (Ask::Attach { access }, Answer::Region(info)) => {
                self.attachment(*access, info, descriptors);
                after.check_region(before, &[]);
                1
            }
            (Ask::Claim { channel, end }, Answer::Claimed) => {
                let holders = |snapshot: &Snapshot| snapshot.holders(*channel, *end);
                assert_eq!((holders(before), holders(after)), (0, 1));
                assert_eq!(after.claims.len(), before.claims.len() + 1);
                let layout = &after.layout;
                assert_eq!(layout.channels()[*channel].peer(*end), layout.host());
                after.check_region(before, &[holder_word(*channel, *end)]);
                4
            }
            (Ask::Release { channel, end }, Answer::Done) => {
                let holders = |snapshot: &Snapshot| snapshot.holders(*channel, *end);
                assert_eq!((holders(before), holders(after)), (1, 0));
                assert_eq!(after.claims.len() + 1, before.claims.len());
                after.check_region(before, &[holder_word(*channel, *end)]);
                0
            }
            (Ask::Status, Answer::Status(status)) => {
                let claims = status.claims.iter().map(|claim| (claim.channel, claim.end));
                let held = before.claims.iter().map(|claim| (claim.channel, claim.end));
                assert!(claims.eq(held));
                for (slot, said) in self.state.slots.iter().zip(&status.slots) {
                    let said = said.vm.as_ref().map(|vm| vm.connection);
                    assert_eq!(said, slot.vm().map(|vm| vm.connection));
                }
                after.check_region(before, &[]);
                0
            }
            (Ask::Reset { channel, force }, Answer::Reset { generation, broken }) => {
                let entry = &before.layout.channels()[*channel];
                let is_held = [End::Producer, End::Consumer].map(|end| {
                    self.before.holders(*channel, end) > 0 || self.is_held_by_guest(*channel, end)
                });
                let held = is_held.into_iter().filter(|is_held| *is_held).count();
                assert!(*force || held == 0, "a channel was reset under its holder");
                // A guest whose epoch has not ended is one more.
                assert!(broken.len() >= held && (*force || broken.is_empty()));
                let word = after.word(entry.offset + channel::GENERATION);
                assert_eq!(*generation, word / 2);
                after.check_region(before, &[header(entry)]);
                0
            }
            (Ask::AddChannel(Entry(wanted)), Answer::Added(added)) => {
                self.added(wanted, added);
                0
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(descriptors.len(), expected, "{answer:?}");
    }

    /// Returns whether the host app may claim, reset and add.
    fn may_write(&self) -> bool {
        (self.app.most, self.app.access) == (Access::ReadWrite, Access::ReadWrite)
    }

    fn is_held_by_guest(&self, channel: usize, end: End) -> bool {
        let layout = &self.before.layout;
        if layout.channels()[channel].peer(end) == layout.host() {
            return false;
        }
        let words = PresenceWords::find(layout, channel, end, layout.region_size);
        words.is_some_and(|words| words.read(self.state.region.words()).is_held())
    }

    fn attachment(&self, access: Access, info: &RegionInfo, descriptors: &[OwnedFd]) {
        let is_permitted = self.app.most == Access::ReadWrite || access == Access::ReadOnly;
        assert!(is_permitted, "a reader can write");
        assert_eq!(info, &RegionInfo::from(&self.before.layout));
        assert_eq!(Layout::try_from(info).as_ref(), Ok(&self.before.layout));
        for memory in descriptors {
            let flags = rustix::fs::fcntl_getfl(memory.as_fd()).expect("it is open");
            let can_write = flags.intersection(OFlags::RWMODE) != OFlags::RDONLY;
            assert_eq!(can_write, access == Access::ReadWrite);
        }
        let is_reader = self.state.roster.is_reader(self.app.id);
        assert_eq!(is_reader, access == Access::ReadOnly);
    }

    /// Checks that a channel was added: the layout and the table in the region have it at the end,
    /// with an empty header, and nothing else has changed.
    fn added(&self, wanted: &Channel, added: &Added) {
        let (before, after) = (self.before, self.after);
        let known = before.layout.channels().len();
        assert_eq!(after.layout.channels().len(), known + 1);
        assert!(after.layout.extends(&before.layout));
        let entry = after.layout.channels()[known];
        let (offset, left) = before.layout.room();
        let expected = Channel {
            offset,
            vector: entry.vector,
            ..*wanted
        };
        assert_eq!(entry, expected);
        assert!(entry.vector < after.layout.vectors);
        let size = entry.end() - entry.offset;
        assert_eq!(after.layout.room(), (entry.end(), left - size));
        assert_eq!(added, &Added::of(&after.layout));
        assert_eq!((added.channel, added.room), (known, left - size));
        let first = table_entry(known);
        let words = (first..).step_by(8).zip(encode_entry(&entry));
        for (offset, word) in words {
            assert_eq!(after.word(offset), word, "the word at {offset:#x}");
        }
        assert_eq!(after.word(TABLE_COUNT), known as u64 + 1);
        let header = header(&entry);
        let mut words = header.clone().step_by(8);
        assert!(words.all(|offset| after.word(offset) == 0), "an old header");
        let table = first..first + 8 * ENTRY_WORDS as u64;
        after.check_region(before, &[TABLE_COUNT..TABLE_COUNT + 8, table, header]);
    }

    /// Checks that a refusal has a reason. The caller has checked that it changed nothing.
    fn refusal(&self, ask: &Ask, refusal: &Refusal) {
        let text = refusal.to_string();
        assert!(
            !text.is_empty() && !text.contains(char::is_control),
            "{text}"
        );
        let layout = &self.before.layout;
        let host = layout.host();
        let entry = |channel: usize| layout.channels().get(channel);
        let changes = matches!(
            ask,
            Ask::Claim { .. } | Ask::Reset { .. } | Ask::AddChannel(_)
        );
        match (ask, refusal) {
            (Ask::Attach { access }, Refusal::Reader) => {
                let (most, access) = (self.app.most, *access);
                assert_eq!((most, access), (Access::ReadOnly, Access::ReadWrite));
            }
            (_, Refusal::Reader) => assert!(changes && self.app.most == Access::ReadOnly),
            (_, Refusal::ReadOnly) => assert!(changes && self.app.access == Access::ReadOnly),
            (
                Ask::Claim { channel, .. }
                | Ask::Release { channel, .. }
                | Ask::Reset { channel, .. },
                Refusal::NoChannel(named),
            ) => assert!(named == channel && entry(*channel).is_none()),
            (Ask::Claim { channel, end }, Refusal::Held(_)) => {
                assert_eq!(self.before.holders(*channel, *end), 1);
            }
            (Ask::Claim { channel, end }, Refusal::NotHere(_)) => {
                assert!(entry(*channel).is_some_and(|entry| entry.peer(*end) != host));
            }
            (Ask::Claim { channel, end }, Refusal::NoConsumer(_)) => {
                let peer = entry(*channel).map(|entry| entry.peer(*end));
                assert_eq!(peer, Some(NO_PEER));
            }
            (Ask::Release { .. }, Refusal::NotHeld) => (),
            (Ask::Reset { force, .. }, Refusal::InUse { .. } | Refusal::VmmLives { .. }) => {
                assert!(!force);
            }
            (Ask::AddChannel(Entry(wanted)), refusal) => self.not_added(wanted, refusal),
            (Ask::ReadGuest { .. } | Ask::ReadBuffer { .. }, refusal) => {
                self.not_read(ask, refusal);
            }
            (Ask::Retire, Refusal::Busy) => (),
            other => panic!("{other:?}"),
        }
    }

    fn not_added(&self, wanted: &Channel, refusal: &Refusal) {
        let layout = &self.before.layout;
        let (offset, left) = layout.room();
        match refusal {
            Refusal::TableFull(count) => assert_eq!(*count, MAX_CHANNELS),
            Refusal::SameName(_) => assert!(layout.find(wanted.name.as_str()).is_some()),
            Refusal::NoRoom { needed, left: said } => {
                assert!(*said == left && *needed > left && *needed > wanted.capacity);
            }
            Refusal::InvalidChannel(_) => (),
            other => panic!("{other:?}"),
        }
        let mut extended = layout.clone();
        let placed = Channel {
            offset,
            vector: 0,
            ..*wanted
        };
        assert!(extended.append(placed).is_err(), "the channel fits");
    }

    fn not_read(&self, ask: &Ask, refusal: &Refusal) {
        let (slot, length) = read_of(ask);
        match refusal {
            Refusal::NotYours => assert!(!self.app.is_owner),
            Refusal::MuchData(said) => assert!(*said == length && length > MAX_COPY),
            Refusal::NoSlot(said) => assert!(*said == slot && slot > 1),
            Refusal::NoVm(said) => {
                let vm = self.state.slots.get(*said as usize).map(|slot| slot.vm());
                assert!(*said == slot && vm == Some(None));
            }
            // The transport of this slot reads no memory.
            Refusal::NoGuestMemory(said) => assert_eq!((*said, slot), (1, 1)),
            // Many requests wait.
            Refusal::Busy => assert_eq!(slot, 0),
            other => panic!("{other:?}"),
        }
    }

    /// Checks that a request without an answer waits for a VM.
    fn waits_for_vm(&self, ask: &Ask) {
        let (slot, length) = read_of(ask);
        assert!(slot == 0 && length <= MAX_COPY && self.app.is_owner);
        assert!(self.state.slots[0].vm().is_some());
    }
}

/// Returns the slot and the length of a request for a guest's memory.
fn read_of(ask: &Ask) -> (u32, usize) {
    match ask {
        Ask::ReadGuest { slot, length, .. } | Ask::ReadBuffer { slot, length, .. } => {
            (*slot, *length)
        }
        other => panic!("{other:?}"),
    }
}
