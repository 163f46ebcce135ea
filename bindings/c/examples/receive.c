// SPDX-License-Identifier: Apache-2.0 OR MIT

// Prints records, which it reads in the shared memory itself.
//
//     cc receive.c $(pkg-config --cflags --libs barlink) -o receive && ./receive default up 3

#include <barlink.h>
#include <stdio.h>
#include <stdlib.h>

static int failed(void) {
    fprintf(stderr, "receive: %s\n", barlink_error_text());
    return 1;
}

int main(int argc, char **argv) {
    barlink *side;
    barlink_receiver *receiver;
    barlink_record record;
    int left;
    if (argc != 4) {
        fprintf(stderr, "usage: receive BROKER CHANNEL COUNT\n");
        return 2;
    }
    if (barlink_connect(argv[1], 0, &side) || barlink_receiver_new(side, argv[2], &receiver)) {
        return failed();
    }
    for (left = atoi(argv[3]); left > 0; left--) {
        if (barlink_receive(receiver, -1, &record)) {
            return failed();
        }
        if (fwrite(record.data, 1, record.length, stdout) < record.length) {
            perror("receive");
            return 1;
        }
        if (barlink_release(receiver)) {
            return failed();
        }
    }
    return barlink_receiver_close(receiver) || barlink_close(side) ? failed() : 0;
}
