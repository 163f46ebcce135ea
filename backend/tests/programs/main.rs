// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the program `barlink` from outside, with real processes and real sockets, and with
//! every invalid input.

mod channels;
mod commands;
mod confined;
mod control;
mod cures;
mod descriptors;
mod gone;
mod hostile;
mod ivshmem;
mod libvirt;
mod limits;
mod live;
mod many;
mod process;
mod qemu_version;
mod questions;
mod readers;
mod refused_calls;
mod replace;
mod serve;
mod sessions;
mod stream_ends;
mod streams;
mod support;
mod surroundings;
mod taps;
mod terminal;
mod vfio_user;
mod vfio_user_buffer;
mod vfio_user_client;
mod vfio_user_guest;
mod vfio_user_hostile;
mod vfio_user_replace;
mod vfio_user_service;
mod vhost_user;
mod vhost_user_client;
mod vhost_user_hostile;
mod vhost_user_memory;
mod vhost_user_replace;
mod vmm;
mod vmm_process;
mod waits;
