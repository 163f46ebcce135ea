// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The state that outlives a broker: descriptors under names, here and with a service manager, and
//! a memory of the broker's own.

mod manager;
pub mod name;
pub(crate) mod state;
mod store;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

pub use self::manager::is_managed;
pub(crate) use self::manager::{is_a_service, is_named_by_manager};
pub use self::name::ClientId;
pub use self::store::{DescriptorStore, inherited};

/// An object with a descriptor, shared by its user and the store.
pub type Stored = Arc<dyn AsFd + Send + Sync>;

/// Descriptors of a broker's predecessor, by name.
pub type Inheritance = BTreeMap<String, OwnedFd>;
