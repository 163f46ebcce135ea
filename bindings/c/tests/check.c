// SPDX-License-Identifier: Apache-2.0 OR MIT

// Calls every function of the library with good and with bad arguments. The channels are `loop`,
// from the host to the host, and `drop`, which drops.

#include <barlink.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

// Ends the program if a call has another result than the expected one.
static void expect(barlink_code found, barlink_code expected, const char *text, int at) {
    if (found != expected || (expected != BARLINK_OK && !strstr(barlink_error_text(), text))) {
        fprintf(stderr, "line %d: %d, not %d: %s\n", at, found, expected, barlink_error_text());
        exit(1);
    }
}

#define OK(call) expect(call, BARLINK_OK, "", __LINE__)
#define FAILS(code, text, call) expect(call, code, text, __LINE__)
#define CHECK(is)                                                                                  \
    do {                                                                                           \
        if (!(is)) {                                                                               \
            fprintf(stderr, "line %d: %s\n", __LINE__, #is);                                       \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static const int64_t SHORT = 1000000;
static const int64_t LONG = 20000000000;

static void sides(const char *control, barlink **side) {
    size_t count;
    int fd;
    barlink_channel channel;
    barlink *other = NULL;
    FAILS(BARLINK_NOT_FOUND, "no-such-broker", barlink_connect("no-such-broker", 0, &other));
    FAILS(BARLINK_NOT_FOUND, "/no/such", barlink_connect("/no/such/socket", 0, &other));
    FAILS(BARLINK_NOT_FOUND, "/dev/no-such", barlink_open("/dev/no-such", 0, &other));
    FAILS(BARLINK_INVALID_INPUT, "flags", barlink_connect(control, 2, &other));
    FAILS(BARLINK_INVALID_INPUT, "result is NULL", barlink_connect(control, 0, NULL));
    FAILS(BARLINK_INVALID_INPUT, "UTF-8", barlink_connect("\xff", 0, &other));
    CHECK(barlink_connect("/\xff", 0, &other) != BARLINK_OK);
    CHECK(other == NULL);
    OK(barlink_connect(control, BARLINK_READ_ONLY, &other));
    OK(barlink_close(other));
    FAILS(BARLINK_INVALID_INPUT, "was closed", barlink_close(other));
    FAILS(BARLINK_INVALID_INPUT, "NULL", barlink_close(NULL));
    OK(barlink_connect(control, 0, side));
    FAILS(BARLINK_INVALID_INPUT, "was closed", barlink_channel_count(other, &count));
    OK(barlink_channel_count(*side, &count));
    CHECK(count == 2);
    OK(barlink_channel_at(*side, 0, &channel));
    CHECK(strcmp(channel.name, "loop") == 0 && channel.capacity == 65536);
    CHECK(channel.max_record == 32744 && channel.sender == channel.host);
    FAILS(BARLINK_INVALID_INPUT, "no channel 2", barlink_channel_at(*side, 2, &channel));
    OK(barlink_descriptor(*side, &fd));
    CHECK(fd >= 0);
}

static void handles(barlink *side) {
    barlink_sender *sender, *other;
    barlink_receiver *receiver;
    FAILS(BARLINK_NOT_FOUND, "none", barlink_sender_new(side, "none", &sender));
    FAILS(BARLINK_INVALID_INPUT, "NULL", barlink_sender_new(side, NULL, &sender));
    FAILS(BARLINK_INVALID_INPUT, "UTF-8", barlink_sender_new(side, "\xff", &sender));
    OK(barlink_sender_new(side, "loop", &sender));
    FAILS(BARLINK_IN_USE, "loop", barlink_sender_new(side, "loop", &other));
    // A handle of another type, one that never was, and memory of the program's own.
    FAILS(BARLINK_INVALID_INPUT, "no receiver", barlink_release((barlink_receiver *)sender));
    FAILS(BARLINK_INVALID_INPUT, "no sender", barlink_discard((barlink_sender *)4096));
    FAILS(BARLINK_INVALID_INPUT, "no sender", barlink_discard((barlink_sender *)&receiver));
    OK(barlink_sender_close(sender));
    OK(barlink_sender_new(side, "loop", &other));
    FAILS(BARLINK_INVALID_INPUT, "was closed", barlink_sender_close(sender));
    OK(barlink_sender_close(other));
}

static void records(barlink *side) {
    barlink_sender *sender;
    barlink_receiver *receiver;
    barlink_record record;
    char buffer[16];
    void *room;
    size_t max;
    int present, fd;
    OK(barlink_sender_new(side, "loop", &sender));
    OK(barlink_has_receiver(sender, &present));
    CHECK(!present);
    OK(barlink_receiver_new(side, "loop", &receiver));
    OK(barlink_has_receiver(sender, &present));
    CHECK(present);
    OK(barlink_has_sender(receiver, &present));
    CHECK(present);
    OK(barlink_max_record(sender, &max));
    CHECK(max == 32744);

    FAILS(BARLINK_TIMED_OUT, "no record now", barlink_receive(receiver, 0, &record));
    FAILS(BARLINK_TIMED_OUT, "0.001 s", barlink_receive(receiver, SHORT, &record));
    FAILS(BARLINK_INVALID_INPUT, "holds no record", barlink_release(receiver));
    FAILS(BARLINK_TOO_LARGE, "32744", barlink_send(sender, BARLINK_USER, "", 0, 0) == BARLINK_OK
                                          ? barlink_reserve(sender, max + 1, 0, &room)
                                          : BARLINK_OTHER);
    OK(barlink_receive(receiver, LONG, &record));
    CHECK(record.length == 0 && record.kind == BARLINK_USER && record.sequence == 0);
    OK(barlink_release(receiver));
    FAILS(BARLINK_INVALID_INPUT, "holds no record", barlink_release(receiver));

    FAILS(BARLINK_INVALID_INPUT, "kind 0", barlink_send(sender, 0, "text", 4, 0));
    FAILS(BARLINK_INVALID_INPUT, "kind 65535", barlink_send(sender, 65535, "text", 4, 0));
    FAILS(BARLINK_INVALID_INPUT, "at NULL", barlink_send(sender, BARLINK_USER, NULL, 4, 0));
    FAILS(BARLINK_INVALID_INPUT, "no memory", barlink_send(sender, BARLINK_USER, "", SIZE_MAX, 0));
    OK(barlink_send(sender, BARLINK_USER + 1, "a text of 21 bytes...", 21, 0));
    record.data = &record;
    FAILS(BARLINK_TOO_LARGE, "21 bytes", barlink_receive_copy(receiver, buffer, 16, 0, &record));
    CHECK(record.length == 21 && record.data == NULL);
    OK(barlink_receive(receiver, 0, &record));
    CHECK(memcmp(record.data, "a text of 21 bytes...", 21) == 0 && record.kind == BARLINK_USER + 1);

    // In place, and with an odd length.
    OK(barlink_reserve(sender, 100, 0, &room));
    FAILS(BARLINK_INVALID_INPUT, "reservation", barlink_send(sender, BARLINK_USER, "", 0, 0));
    FAILS(BARLINK_INVALID_INPUT, "reservation", barlink_write(sender, "", 0));
    FAILS(BARLINK_INVALID_INPUT, "reservation", barlink_finish(sender));
    FAILS(BARLINK_INVALID_INPUT, "101 bytes", barlink_commit(sender, BARLINK_USER, 101));
    FAILS(BARLINK_INVALID_INPUT, "kind 0", barlink_commit(sender, 0, 100));
    memset(room, 'x', 100);
    OK(barlink_commit(sender, BARLINK_USER, 11));
    FAILS(BARLINK_INVALID_INPUT, "no reservation", barlink_commit(sender, BARLINK_USER, 1));
    FAILS(BARLINK_INVALID_INPUT, "no reservation", barlink_discard(sender));
    OK(barlink_reserve(sender, 100, 0, &room));
    OK(barlink_discard(sender));
    // This releases the record before.
    OK(barlink_receive_copy(receiver, buffer, 16, 0, &record));
    CHECK(record.length == 11 && record.data == buffer && memcmp(buffer, "xxxxxxxxxxx", 11) == 0);
    FAILS(BARLINK_TIMED_OUT, "no record", barlink_receive(receiver, 0, &record));

    OK(barlink_receiver_descriptor(receiver, &fd));
    struct pollfd poller = {fd, POLLIN, 0};
    CHECK(poll(&poller, 1, 0) == 0);
    OK(barlink_send(sender, BARLINK_USER, "text", 4, 0));
    CHECK(poll(&poller, 1, 20000) == 1);
    OK(barlink_receive(receiver, 0, &record));
    OK(barlink_sender_descriptor(sender, &fd));
    CHECK(fd >= 0);

    // A full channel, and a receiver that closes with a record held.
    while (barlink_send(sender, BARLINK_USER, "text", 4, 0) == BARLINK_OK) {
    }
    FAILS(BARLINK_FULL, "", barlink_send(sender, BARLINK_USER, "text", 4, SHORT));
    FAILS(BARLINK_FULL, "", barlink_reserve(sender, 4, SHORT, &room));
    OK(barlink_receiver_close(receiver));
    OK(barlink_send(sender, BARLINK_USER, "text", 4, 0));
    OK(barlink_sender_close(sender));
}

static void drops(barlink *side) {
    barlink_sender *sender;
    barlink_code code;
    OK(barlink_sender_new(side, "drop", &sender));
    while ((code = barlink_send(sender, BARLINK_USER, "text", 4, -1)) == BARLINK_OK) {
    }
    FAILS(BARLINK_DROPPED, "dropped the record", code);
    OK(barlink_sender_close(sender));
}

static void streams(barlink *side) {
    barlink_sender *sender;
    barlink_receiver *receiver;
    barlink_record record;
    char buffer[64];
    size_t length;
    OK(barlink_sender_new(side, "loop", &sender));
    OK(barlink_receiver_new(side, "loop", &receiver));
    while (barlink_receive(receiver, 0, &record) == BARLINK_OK) {
    }
    OK(barlink_write(sender, "hello ", 6));
    FAILS(BARLINK_INVALID_INPUT, "stream", barlink_send(sender, BARLINK_USER, "", 0, 0));
    OK(barlink_write(sender, "world", 5));
    OK(barlink_finish(sender));
    OK(barlink_finish(sender));
    OK(barlink_read(receiver, buffer, 64, &length));
    CHECK(length == 6 && memcmp(buffer, "hello ", 6) == 0);
    OK(barlink_read(receiver, buffer, 3, &length));
    CHECK(length == 3 && memcmp(buffer, "wor", 3) == 0);
    OK(barlink_read(receiver, buffer, 64, &length));
    CHECK(length == 2);
    FAILS(BARLINK_END, "ended", barlink_read(receiver, buffer, 64, &length));
    FAILS(BARLINK_END, "ended", barlink_read(receiver, buffer, 64, &length));
    // A stream that its sender leaves.
    OK(barlink_write(sender, "part", 4));
    OK(barlink_sender_close(sender));
    OK(barlink_read(receiver, buffer, 64, &length));
    FAILS(BARLINK_INCOMPLETE, "left before", barlink_read(receiver, buffer, 64, &length));
    OK(barlink_receiver_close(receiver));
}

static void taps(barlink *side) {
    barlink_sender *sender;
    barlink_tap *tap;
    barlink_record record;
    uint64_t missed, dropped;
    int fd;
    OK(barlink_sender_new(side, "loop", &sender));
    OK(barlink_tap_new(side, "loop", &tap));
    FAILS(BARLINK_TIMED_OUT, "no record now", barlink_tap_next(tap, 0, &record));
    OK(barlink_send(sender, BARLINK_USER, "first", 5, 0));
    OK(barlink_send(sender, BARLINK_USER, "second", 6, 0));
    OK(barlink_tap_next(tap, LONG, &record));
    CHECK(record.length == 5 && memcmp(record.data, "first", 5) == 0);
    OK(barlink_tap_latest(tap, &record));
    CHECK(record.length == 6 && memcmp(record.data, "second", 6) == 0);
    OK(barlink_tap_missed(tap, &missed, &dropped));
    CHECK(missed == 0 && dropped == 0);
    OK(barlink_tap_descriptor(tap, &fd));
    CHECK(fd >= 0);
    OK(barlink_tap_close(tap));
    FAILS(BARLINK_INVALID_INPUT, "was closed", barlink_tap_next(tap, 0, &record));
    OK(barlink_sender_close(sender));
}

// A process that was forked holds nothing of its parent's.
static void forks(barlink *side) {
    barlink_sender *sender;
    int status;
    OK(barlink_sender_new(side, "loop", &sender));
    pid_t child = fork();
    if (child == 0) {
        FAILS(BARLINK_INHERITED, "process", barlink_send(sender, BARLINK_USER, "child", 5, 0));
        OK(barlink_sender_close(sender));
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    OK(barlink_send(sender, BARLINK_USER, "parent", 6, 0));
    OK(barlink_sender_close(sender));
}

int main(int argc, char **argv) {
    barlink *side;
    CHECK(argc == 2);
    CHECK(strchr(barlink_version(), '.') && strcmp(barlink_error_text(), "") == 0);
    sides(argv[1], &side);
    handles(side);
    records(side);
    drops(side);
    streams(side);
    taps(side);
    forks(side);
    OK(barlink_close(side));
    return 0;
}
