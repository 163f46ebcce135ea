// barlink: shared memory as a PCI device, between guests and their host.
//
// A program on the host connects to a broker, and a program in a guest opens a device. Both then
// exchange records through channels in the same way, without a copy if they want:
//
//     #include <barlink.h>
//     #include <stdio.h>
//
//     int main(void) {
//         barlink *host;
//         barlink_receiver *up;
//         barlink_record record;
//         if (barlink_connect("default", 0, &host) || barlink_receiver_new(host, "up", &up)) {
//             fprintf(stderr, "%s\n", barlink_error_text());
//             return 1;
//         }
//         while (barlink_receive(up, -1, &record) == BARLINK_OK) {
//             printf("record %d: %zu bytes\n", (int)record.sequence, record.length);
//         }
//         fprintf(stderr, "%s\n", barlink_error_text());
//         return 1;
//     }
//
// Every function returns BARLINK_OK, which is 0, or the class of an error, and then
// barlink_error_text() has its text. Handles are numbers: one that is NULL, was closed or is of
// another type is an error. Times are in nanoseconds, sizes in bytes. In a process that was forked,
// handles from before are errors, and it makes its own.
//
// SPDX-License-Identifier: Apache-2.0 OR MIT

#ifndef BARLINK_H
#define BARLINK_H

#include <stddef.h>
#include <stdint.h>

// The kind of records that are data of a stream.
#define BARLINK_DATA 1

// The first kind that belongs to programs.
#define BARLINK_USER 256

// Access for reading only, for `barlink_connect` and `barlink_open`.
#define BARLINK_READ_ONLY 1

// The result of a call: 0, or the class of its error. `barlink_error_text` has the details.
typedef enum barlink_code {
    // The call did what it is for.
    BARLINK_OK = 0,
    // There is no broker, device or channel of that name.
    BARLINK_NOT_FOUND = 1,
    // The process lacks a permission for the call.
    BARLINK_PERMISSION_DENIED = 2,
    // Another process uses the end of the channel or the device, which may be free later.
    BARLINK_IN_USE = 3,
    // The broker or the driver is of another release.
    BARLINK_INCOMPATIBLE = 4,
    // An argument is not valid, or the handle is closed, of another type, or busy with a
    // reservation or a stream.
    BARLINK_INVALID_INPUT = 5,
    // The broker closed the connection, or does not answer.
    BARLINK_DISCONNECTED = 6,
    // The device was unplugged, its driver was unbound, or it has lost its region.
    BARLINK_GONE = 7,
    // The channel has no room, and had none until the timeout.
    BARLINK_FULL = 8,
    // The record is larger than the channel carries, or than the buffer.
    BARLINK_TOO_LARGE = 9,
    // The other end wrote invalid words to the channel.
    BARLINK_CORRUPT = 10,
    // The channel was reset while the end was in use. The program can claim the end anew.
    BARLINK_RESET = 11,
    // Parts of a stream are missing, or the next record is not of the stream.
    BARLINK_INCOMPLETE = 12,
    // No record came until the timeout.
    BARLINK_TIMED_OUT = 13,
    // The process that this one was forked from made the handle. This process makes its own.
    BARLINK_INHERITED = 14,
    // The channel drops records that find no room, and dropped this one.
    BARLINK_DROPPED = 15,
    // The stream has ended.
    BARLINK_END = 16,
    // A system call failed, or something else.
    BARLINK_OTHER = 17,
} barlink_code;

// The receiving end of a channel. One thread at a time uses it.
typedef struct barlink_receiver barlink_receiver;

// The sending end of a channel. One thread at a time uses it.
typedef struct barlink_sender barlink_sender;

// A connection of a host program to a broker, or a device in a guest. Any number of threads can
// make ends and taps of it at a time; one thread closes it, and none uses it meanwhile or later.
typedef struct barlink barlink;

// A further reader of a channel, a tap. One thread at a time uses it.
typedef struct barlink_tap barlink_tap;

// A record.
typedef struct barlink_record {
    // The bytes. How long they are valid is said by the function that found the record.
    const void *data;
    // Number of bytes.
    size_t length;
    // Number of the record. A gap stands for records that were dropped.
    uint64_t sequence;
    // Time of the record, in nanoseconds of `clock`.
    uint64_t time;
    // Number of records that were dropped, or that a tap missed, just before this one. A tap
    // counts them in `barlink_tap_missed` alone.
    uint64_t missed;
    // The kind: `BARLINK_DATA`, or from `BARLINK_USER` on one of the sender's own.
    uint16_t kind;
    // The clock: 0 for the sender's monotonic one.
    uint8_t clock;
} barlink_record;

// A channel of a region.
typedef struct barlink_channel {
    // The name, which ends with a 0.
    char name[32];
    // The peer that sends: the number of the VM's slot, or `host`.
    uint32_t sender;
    // The peer that receives, or UINT32_MAX if the channel overwrites and has taps alone.
    uint32_t receiver;
    // The number of the host, which is behind those of all slots.
    uint32_t host;
    // Most bytes of a record.
    uint32_t max_record;
    // Bytes of the data area.
    uint64_t capacity;
} barlink_channel;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Returns the text of this thread's last error: one line of UTF-8 that says what failed, on what,
// and what to do. It is empty before the first error, and valid until the next call of the thread
// that fails.
const char *barlink_error_text(void);

// Returns the version of the library, as "1.2.3". It lives as long as the program.
const char *barlink_version(void);

// Claims the receiving end of a channel. Stores a handle, which `barlink_receiver_close` closes.
//
// Required:
// `channel` ends with a 0; `out` has room for a pointer; no thread closes `side` meanwhile.
enum barlink_code barlink_receiver_new(struct barlink *side,
                                       const char *channel,
                                       struct barlink_receiver **out);

// Closes a receiver: releases the record that it holds, and gives the end back.
//
// Required:
// No other thread uses the handle.
enum barlink_code barlink_receiver_close(struct barlink_receiver *receiver);

// Receives the next record in place, in the shared memory. Waits for it up to `timeout`
// nanoseconds: for ever if it is negative, not at all if it is 0. The result is then
// `BARLINK_TIMED_OUT`. The bytes are valid until `barlink_release`, or the next call that
// receives, which releases the record first. A sender in another VM could still change them: copy
// what must not change between a check and its use.
//
// Required:
// `record` has room for a record; no other thread uses the handle.
enum barlink_code barlink_receive(struct barlink_receiver *receiver,
                                  int64_t timeout,
                                  struct barlink_record *record);

// Releases the record that `barlink_receive` found, so that the sender can use its room.
//
// Required:
// No other thread uses the handle.
enum barlink_code barlink_release(struct barlink_receiver *receiver);

// Receives the next record into a buffer of `capacity` bytes, and releases it. If the buffer is
// too small, the result is `BARLINK_TOO_LARGE`, `record` has the length, and the record stays in
// the channel. Waits as `barlink_receive` does.
//
// Required:
// `buffer` has `capacity` bytes; `record` has room for a record; no other thread uses the handle.
enum barlink_code barlink_receive_copy(struct barlink_receiver *receiver,
                                       void *buffer,
                                       size_t capacity,
                                       int64_t timeout,
                                       struct barlink_record *record);

// Reads bytes of a stream, as `barlink recv` does. Waits for some, and stores how many there are.
// The result is `BARLINK_END` at the end of the stream, and the next call reads the next stream.
// It is `BARLINK_INCOMPLETE` if the sender left before, or if records are missing.
//
// Required:
// `buffer` has `capacity` bytes; `length` has room for a number; no other thread uses the handle.
enum barlink_code barlink_read(struct barlink_receiver *receiver,
                               void *buffer,
                               size_t capacity,
                               size_t *length);

// Stores whether a program sends into the channel now: 1 or 0.
//
// Required:
// `present` has room for a number; no other thread uses the handle.
enum barlink_code barlink_has_sender(struct barlink_receiver *receiver, int *present);

// Stores a descriptor for `poll`: readable when there may be a record. It belongs to the handle:
// do not close it.
//
// Required:
// `descriptor` has room for a number; no other thread uses the handle.
enum barlink_code barlink_receiver_descriptor(struct barlink_receiver *receiver, int *descriptor);

// Claims the sending end of a channel. Stores a handle, which `barlink_sender_close` closes.
//
// Required:
// `channel` ends with a 0; `out` has room for a pointer; no thread closes `side` meanwhile.
enum barlink_code barlink_sender_new(struct barlink *side,
                                     const char *channel,
                                     struct barlink_sender **out);

// Closes a sender: gives the end back, and discards a reservation. Records that were sent stay in
// the channel.
//
// Required:
// No other thread uses the handle.
enum barlink_code barlink_sender_close(struct barlink_sender *sender);

// Sends a record of so many bytes. If the channel has no room, waits up to `timeout` nanoseconds:
// for ever if it is negative, not at all if it is 0. The result is then `BARLINK_FULL`. A channel
// that drops does not wait, and the result is `BARLINK_DROPPED`. `kind` is `BARLINK_DATA`, or from
// `BARLINK_USER` to 65534 a kind of your own.
//
// Required:
// `data` has `length` bytes; no other thread uses the handle.
enum barlink_code barlink_send(struct barlink_sender *sender,
                               uint16_t kind,
                               const void *data,
                               size_t length,
                               int64_t timeout);

// Reserves room for a record of so many bytes in the shared memory, and stores where it is. Write
// the record there, and commit it. Waits for room as `barlink_send` does, also in a channel that
// drops. The memory is valid until the commit, the discard, or the close.
//
// Required:
// `data` has room for a pointer; no other thread uses the handle.
enum barlink_code barlink_reserve(struct barlink_sender *sender,
                                  size_t length,
                                  int64_t timeout,
                                  void **data);

// Commits the first `length` bytes of a reservation as a record.
//
// Required:
// No other thread uses the handle.
enum barlink_code barlink_commit(struct barlink_sender *sender, uint16_t kind, size_t length);

// Gives up a reservation. The channel is as it was.
//
// Required:
// No other thread uses the handle.
enum barlink_code barlink_discard(struct barlink_sender *sender);

// Sends bytes of a stream, as `barlink send` does: the first call begins the stream, and
// `barlink_finish` ends it. Waits for room as long as it takes.
//
// Required:
// `data` has `length` bytes; no other thread uses the handle.
enum barlink_code barlink_write(struct barlink_sender *sender, const void *data, size_t length);

// Ends a stream. Without a `barlink_write` before, the stream has no bytes.
//
// Required:
// No other thread uses the handle.
enum barlink_code barlink_finish(struct barlink_sender *sender);

// Stores the most bytes that a record can have.
//
// Required:
// `length` has room for a number; no other thread uses the handle.
enum barlink_code barlink_max_record(struct barlink_sender *sender, size_t *length);

// Stores whether a program receives from the channel now: 1 or 0.
//
// Required:
// `present` has room for a number; no other thread uses the handle.
enum barlink_code barlink_has_receiver(struct barlink_sender *sender, int *present);

// Stores a descriptor for `poll`: readable when there may be room again, after a call that found
// none. It belongs to the handle: do not close it.
//
// Required:
// `descriptor` has room for a number; no other thread uses the handle.
enum barlink_code barlink_sender_descriptor(struct barlink_sender *sender, int *descriptor);

// Connects a program of the host to the broker of this name, or to the one at this control socket
// if the text has a `/`. NULL stands for the broker `default`. `flags` is 0 or
// `BARLINK_READ_ONLY`, which taps need. Stores a handle, which `barlink_close` closes.
//
// Required:
// `name` is NULL or ends with a 0; `out` has room for a pointer.
enum barlink_code barlink_connect(const char *name, uint32_t flags, struct barlink **out);

// Opens a device in a guest: the node of the driver such as `/dev/barlink0`, which NULL stands
// for, or the broker's name, or `sysfs:0000:01:00.0` or `vfio:0000:01:00.0` without the driver.
// `flags` is 0 or `BARLINK_READ_ONLY`. Stores a handle, which `barlink_close` closes.
//
// Required:
// `device` is NULL or ends with a 0; `out` has room for a pointer.
enum barlink_code barlink_open(const char *device, uint32_t flags, struct barlink **out);

// Closes a connection or a device. Ends and taps that were made of it go on.
//
// Required:
// No other thread uses the handle.
enum barlink_code barlink_close(struct barlink *side);

// Stores the number of channels.
//
// Required:
// `count` has room for a number.
enum barlink_code barlink_channel_count(struct barlink *side, size_t *count);

// Describes the channel with this number, from 0 on.
//
// Required:
// `channel` has room for a description.
enum barlink_code barlink_channel_at(struct barlink *side,
                                     size_t number,
                                     struct barlink_channel *channel);

// Stores a descriptor that is readable or hung up once the broker has ended or the device is gone.
// It belongs to the handle: do not close it.
//
// Required:
// `descriptor` has room for a number.
enum barlink_code barlink_descriptor(struct barlink *side, int *descriptor);

// Makes a tap of a channel, which begins behind the newest record. Stores a handle, which
// `barlink_tap_close` closes.
//
// Required:
// `channel` ends with a 0; `out` has room for a pointer; no thread closes `side` meanwhile.
enum barlink_code barlink_tap_new(struct barlink *side,
                                  const char *channel,
                                  struct barlink_tap **out);

// Closes a tap, and frees the record that it copied last.
//
// Required:
// No other thread uses the handle.
enum barlink_code barlink_tap_close(struct barlink_tap *tap);

// Copies the next record. Waits for it up to `timeout` nanoseconds: for ever if it is negative,
// not at all if it is 0. The result is then `BARLINK_TIMED_OUT`. The bytes are the tap's, and
// valid until the next call with this tap.
//
// Required:
// `record` has room for a record; no other thread uses the handle.
enum barlink_code barlink_tap_next(struct barlink_tap *tap,
                                   int64_t timeout,
                                   struct barlink_record *record);

// Copies the newest record, also if this tap has copied it before. The result is
// `BARLINK_TIMED_OUT` if there is none. The bytes are the tap's, and valid until the next call
// with this tap.
//
// Required:
// `record` has room for a record; no other thread uses the handle.
enum barlink_code barlink_tap_latest(struct barlink_tap *tap, struct barlink_record *record);

// Stores the numbers of records that the tap missed, and that the sender dropped, since it began.
//
// Required:
// `missed` and `dropped` have room for a number each; no other thread uses the handle.
enum barlink_code barlink_tap_missed(struct barlink_tap *tap, uint64_t *missed, uint64_t *dropped);

// Stores a descriptor for `poll`: readable when it is time to look for a record. It belongs to the
// handle: do not close it.
//
// Required:
// `descriptor` has room for a number; no other thread uses the handle.
enum barlink_code barlink_tap_descriptor(struct barlink_tap *tap, int *descriptor);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* BARLINK_H */
