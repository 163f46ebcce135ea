// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of streams whose system calls fail: files that need pinned memory, and files that report
//! an error when they are closed.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};

use barlink::stream::{self, StreamError};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::streams::{LOOP, recv, send};
use crate::support::*;

/// Makes some system calls of this thread, and of programs that it starts, fail with this error if
/// their arguments match the conditions.
fn refuse(calls: &[libc::c_long], conditions: Vec<SeccompCondition>, error: i32) {
    let rules = vec![SeccompRule::new(conditions).unwrap()];
    let filter = SeccompFilter::new(
        calls.iter().map(|call| (*call, rules.clone())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(error.unsigned_abs()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    seccompiler::apply_filter(&BpfProgram::try_from(filter.unwrap()).unwrap()).unwrap();
}

#[test]
fn stream_goes_around_memory_without_pinning() {
    // A file can refuse the memory, or only its address.
    for error in [libc::EFAULT, libc::EINVAL] {
        streams_without_buffers_in_region(error);
    }
}

fn streams_without_buffers_in_region(error: i32) {
    let broker = Broker::start(&LOOP);
    let bytes = noise(300_001);
    let [source, target] = ["in", "out"].map(|name| broker.path(name));
    file_with(&source, &bytes);
    let attachment = broker.attach();
    let mut sender = attachment.sender("loop").unwrap();
    let mut receiver = attachment.receiver("loop").unwrap();
    sender.send(barlink::Kind::USER, b"probe").unwrap();
    let payload = receiver.recv().unwrap().words().as_ptr() as u64;
    let layout = attachment.layout();
    let start = payload - layout.find("loop").unwrap().1.offset - 4096 - 24;
    let range = start..start + layout.region_size;
    // A thread of its own, because the filter remains.
    let streaming = std::thread::spawn(move || {
        // The kernel refuses as for files that need the memory pinned, in a guest.
        let within = |compare, address| {
            SeccompCondition::new(1, SeccompCmpArgLen::Qword, compare, address).unwrap()
        };
        let conditions = vec![
            within(SeccompCmpOp::Ge, range.start),
            within(SeccompCmpOp::Lt, range.end),
        ];
        refuse(&[libc::SYS_read, libc::SYS_write], conditions, error);
        let sent = stream::send(&mut sender, File::open(&source).unwrap(), 100_000, &mut ());
        assert_eq!(sent.unwrap().records, 4);
        let received = stream::receive(&mut receiver, File::create(&target).unwrap(), &mut ());
        assert_eq!(received.unwrap().bytes, 300_001);
        assert!(std::fs::read(&target).unwrap() == bytes);
        let mut reservation = sender.reserve(1000).unwrap();
        let source = File::open(&source).unwrap();
        assert_eq!(reservation.read_from(source).unwrap(), 1000);
        reservation.commit(barlink::Kind::USER).unwrap();
        let file = File::create(&target).unwrap();
        assert_eq!(receiver.recv().unwrap().write_to(file).unwrap(), 1000);
        assert!(std::fs::read(target).unwrap() == bytes[..1000]);
    });
    join("all is received", streaming);
}

/// Makes the kernel report an exceeded quota when this thread closes a file.
fn refuse_to_close() {
    // The loader of programs closes descriptor 3, and does not go on after an error.
    let high = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Gt, 3);
    refuse(&[libc::SYS_close], vec![high.unwrap()], libc::EDQUOT);
}

/// Runs a program whose calls of `close` fail, which must end with exit code 1. Returns its errors.
fn fails_to_close(broker: &Broker, mut command: Command) -> String {
    let errors = broker.path("errors");
    let stderr = File::create(&errors).unwrap();
    command.stdin(Stdio::null()).stderr(stderr);
    // A thread of its own, because the filter remains. The program inherits it.
    let starting = std::thread::spawn(move || {
        refuse_to_close();
        command.spawn().unwrap()
    });
    let status = join("it is started", starting).wait().unwrap();
    let errors = std::fs::read_to_string(errors).unwrap();
    assert_eq!(status.code(), Some(1), "{errors}");
    errors
}

/// A quota or a file server reports its error when the file is closed, also if the stream is not
/// whole.
#[test]
fn receiver_reports_error_of_closing_file() {
    let broker = Broker::start(&LOOP);
    file_with(&broker.path("in"), b"some text");
    for is_whole in [true, false] {
        if is_whole {
            works(send(&broker).arg(broker.path("in")));
        } else {
            // Its sender leaves before the end.
            let mut sender = broker.attach().sender("loop").unwrap();
            sender.stream().write_all(b"some").unwrap();
        }
        let out = broker.path("out");
        let mut receiver = recv(&broker);
        receiver.arg("-o").arg(&out).stdout(Stdio::null());
        let errors = fails_to_close(&broker, receiver);
        let text = format!("cannot write {}", out.display());
        assert!(
            errors.contains(&text) && errors.contains("quota"),
            "{errors}"
        );
    }
}

/// A program that drops its file learns of no error at its close.
#[test]
fn library_reports_error_of_closing_file() {
    let broker = Broker::start(&LOOP);
    let attachment = broker.attach();
    let mut sender = attachment.sender("loop").unwrap();
    let mut receiver = attachment.receiver("loop").unwrap();
    let mut stream = sender.stream();
    stream.write_all(b"some text").unwrap();
    stream.finish().unwrap();
    let target = File::create(broker.path("out")).unwrap();
    let receiving = std::thread::spawn(move || {
        refuse_to_close();
        stream::receive(&mut receiver, target, &mut ()).unwrap_err()
    });
    let error = join("it is received", receiving);
    let StreamError::Close { source, progress } = error else {
        panic!("{error:?}");
    };
    assert_eq!(
        (source.raw_os_error(), progress.bytes),
        (Some(libc::EDQUOT), 9)
    );
}

/// A quota or a file server reports its error when the file is closed.
#[test]
fn error_of_closing_standard_output_is_reported() {
    let broker = Broker::start(&LOOP);
    file_with(&broker.path("in"), b"some text");
    works(send(&broker).arg(broker.path("in")));
    let latest = broker.app(&["recv", "--channel", "loop", "--latest"]);
    let mut sender = broker.attach().sender("loop").unwrap();
    sender.send(barlink::Kind::USER, b"newest").unwrap();
    for mut command in [recv(&broker), latest] {
        command.stdout(File::create(broker.path("out")).unwrap());
        let errors = fails_to_close(&broker, command);
        assert!(
            errors.contains("standard output") && errors.contains("quota"),
            "{errors}"
        );
    }
}
