// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The names of stored descriptors. Brokers of different versions exchange them, so they stay, also
//! where the thing has another name by now: `ledger` is the persisted state, `bell` an eventfd.

/// The number of a host app's connection, by which its claims are known.
pub type ClientId = u64;

/// The region's memory.
pub const MEMORY: &str = "memory";
/// The memory of the [persisted state](super::state).
pub const STATE: &str = "ledger";
/// The control socket that the broker listens at.
pub const CONTROL: &str = "control";

/// Names the socket that the broker listens at for a slot's VM.
pub fn slot(slot: u32) -> String {
    format!("slot-{slot}")
}

/// Names the lock of a listening socket.
pub fn lock(listener: &str) -> String {
    format!("{listener}-lock")
}

/// Names an eventfd.
pub fn eventfd(peer: u32, vector: u32) -> String {
    format!("bell-{peer}-{vector}")
}

/// Names the connection of a slot's VM.
pub fn vm(slot: u32) -> String {
    format!("vm-{slot}")
}

/// Names the process of a slot's VMM.
pub fn vmm(slot: u32) -> String {
    format!("vmm-{slot}")
}

/// Names the session memory of a slot whose transport has one.
pub fn session(slot: u32) -> String {
    format!("session-{slot}")
}

/// Names a descriptor of a slot's session, by the name that the transport gives it.
pub fn part(slot: u32, what: &str) -> String {
    format!("part-{slot}-{what}")
}

/// Returns whether a name is one of a session's descriptors.
pub fn is_part(name: &str) -> bool {
    name.starts_with("part-")
}

/// Returns the slot whose VM a descriptor belongs to, if it belongs to one.
pub fn parse_slot(name: &str) -> Option<u32> {
    let rest = name
        .strip_prefix("part-")
        .or_else(|| name.strip_prefix("vm-"))
        .or_else(|| name.strip_prefix("vmm-"))?;
    rest.split('-').next()?.parse().ok()
}

/// Names the connection of a host app.
pub fn client(client: ClientId) -> String {
    format!("client-{client}")
}

/// Returns the host app whose connection has a name, if it is one.
pub fn parse_client(name: &str) -> Option<ClientId> {
    name.strip_prefix("client-")?.parse().ok()
}

/// Returns whether a broker stores descriptors under such a name. A service manager also passes the
/// sockets of a `.socket` unit.
pub fn is_of_broker(name: &str) -> bool {
    let with_numbers = [
        slot(0),
        eventfd(0, 0),
        vm(0),
        vmm(0),
        session(0),
        part(0, "0"),
        client(0),
    ];
    let stem = |name: &str| name.split_once('-').map(|(stem, _)| stem.to_owned());
    let is_numbered = |name: &str| {
        let rest = name.split_once('-').map(|(_, rest)| rest);
        let is_number = rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        is_number && with_numbers.iter().any(|known| stem(known) == stem(name))
    };
    [MEMORY, STATE, CONTROL, &lock(CONTROL)].contains(&name) || is_numbered(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_units_have_other_names() {
        let names = [
            MEMORY.to_owned(),
            STATE.to_owned(),
            lock(CONTROL),
            lock(&slot(2)),
            eventfd(3, 4),
            vmm(5),
            part(7, "irq"),
            client(8),
        ];
        assert!(names.iter().all(|name| is_of_broker(name)));
        for name in ["barlink@vm1.socket", "unknown", "slot-x", "vm1.socket", ""] {
            assert!(!is_of_broker(name), "{name}");
        }
    }

    #[test]
    fn names_are_those_of_running_brokers() {
        let names = [
            MEMORY.to_owned(),
            STATE.to_owned(),
            lock(CONTROL),
            slot(2),
            eventfd(3, 4),
            vm(5),
            session(6),
            part(7, "irq"),
            client(8),
        ];
        let stored =
            "memory ledger control-lock slot-2 bell-3-4 vm-5 session-6 part-7-irq client-8";
        assert_eq!(names.join(" "), stored);
    }
}
