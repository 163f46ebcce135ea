// SPDX-License-Identifier: Apache-2.0 OR MIT

// Sends the lines of standard input as records. In a guest, barlink_open(NULL, 0, &side) takes the
// place of barlink_connect.
//
//     cc send.c $(pkg-config --cflags --libs barlink) -o send && echo hello | ./send default down

#include <barlink.h>
#include <stdio.h>
#include <string.h>

static int failed(void) {
    fprintf(stderr, "send: %s\n", barlink_error_text());
    return 1;
}

int main(int argc, char **argv) {
    barlink *side;
    barlink_sender *sender;
    char line[256];
    if (argc != 3) {
        fprintf(stderr, "usage: send BROKER CHANNEL\n");
        return 2;
    }
    if (barlink_connect(argv[1], 0, &side) || barlink_sender_new(side, argv[2], &sender)) {
        return failed();
    }
    while (fgets(line, sizeof line, stdin)) {
        if (barlink_send(sender, BARLINK_USER, line, strlen(line), -1)) {
            return failed();
        }
    }
    return barlink_sender_close(sender) || barlink_close(side) ? failed() : 0;
}
